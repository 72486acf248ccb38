"""Usage as each provider reports it, by its documents and captures; and what it comes to."""

from typing import Any

from accounting.contract.usage_event import TokenUsage

GOLDEN: dict[str, tuple[dict[str, Any], TokenUsage]] = {
    "openai": (
        {
            "prompt_tokens": 2006,
            "completion_tokens": 300,
            "total_tokens": 2306,
            "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 192,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        TokenUsage(2006, 300, cached_input=1920, reasoning=192),
    ),
    "openai audio": (
        {
            "prompt_tokens": 100,
            "completion_tokens": 80,
            "total_tokens": 180,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 60},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 70},
        },
        TokenUsage(100, 80, audio_input=60, audio_output=70),
    ),
    "anthropic, compatible": (
        {"prompt_tokens": 21, "completion_tokens": 9, "total_tokens": 30},
        TokenUsage(21, 9),
    ),
    "a router in front of anthropic": (
        {
            "prompt_tokens": 1400,
            "completion_tokens": 10,
            "total_tokens": 1410,
            "prompt_tokens_details": {"cached_tokens": 1000, "cache_write_tokens": 300},
        },
        TokenUsage(1400, 10, cached_input=1000, cache_write=300),
    ),
    "gemini: thoughts are in the total alone": (
        {"prompt_tokens": 8, "completion_tokens": 20, "total_tokens": 528},
        TokenUsage(8, 520),
    ),
    "xai: reasoning is outside of completion_tokens": (
        {
            "prompt_tokens": 32,
            "completion_tokens": 9,
            "total_tokens": 135,
            "prompt_tokens_details": {"text_tokens": 32, "audio_tokens": 0, "cached_tokens": 6},
            "completion_tokens_details": {"reasoning_tokens": 94, "audio_tokens": 0},
        },
        TokenUsage(32, 103, cached_input=6, reasoning=94),
    ),
    "deepseek": (
        {
            "prompt_tokens": 650,
            "completion_tokens": 40,
            "total_tokens": 690,
            "prompt_cache_hit_tokens": 640,
            "prompt_cache_miss_tokens": 10,
        },
        TokenUsage(650, 40, cached_input=640),
    ),
    "deepseek, both ways": (
        {
            "prompt_tokens": 650,
            "completion_tokens": 40,
            "total_tokens": 690,
            "prompt_tokens_details": {"cached_tokens": 640},
            "completion_tokens_details": {"reasoning_tokens": 30},
            "prompt_cache_hit_tokens": 640,
        },
        TokenUsage(650, 40, cached_input=640, reasoning=30),
    ),
    "qwen": (
        {
            "prompt_tokens": 3019,
            "completion_tokens": 104,
            "total_tokens": 3123,
            "prompt_tokens_details": {"cached_tokens": 2048},
        },
        TokenUsage(3019, 104, cached_input=2048),
    ),
    "all zero": (
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        TokenUsage(),
    ),
    "no total": ({"prompt_tokens": 3, "completion_tokens": 4}, TokenUsage(3, 4)),
    "no output": ({"prompt_tokens": 3}, TokenUsage(3, 0)),
    "output from the total": ({"prompt_tokens": 3, "total_tokens": 8}, TokenUsage(3, 5)),
    "input from the total": ({"completion_tokens": 3, "total_tokens": 8}, TokenUsage(5, 3)),
    "a total below its parts": (
        {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 1},
        TokenUsage(3, 4),
    ),
    "nulls": (
        {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": None,
            "prompt_tokens_details": None,
            "completion_tokens_details": {"reasoning_tokens": None, "audio_tokens": None},
        },
        TokenUsage(3, 4),
    ),
    "floats": (
        {"prompt_tokens": 3.0, "completion_tokens": 4.0, "total_tokens": 7.0},
        TokenUsage(3, 4),
    ),
    "negative": (
        {
            "prompt_tokens": -3,
            "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": -9},
        },
        TokenUsage(0, 4),
    ),
    "details beyond their totals": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "prompt_tokens_details": {
                "cached_tokens": 8,
                "cache_write_tokens": 8,
                "audio_tokens": 8,
            },
            "completion_tokens_details": {"reasoning_tokens": 99, "audio_tokens": 99},
        },
        TokenUsage(10, 5, cached_input=8, cache_write=2, reasoning=5, audio_output=5),
    ),
    "details of a foreign kind": (
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "prompt_tokens_details": [],
            "completion_tokens_details": {"reasoning_tokens": "many"},
        },
        TokenUsage(10, 5),
    ),
}
