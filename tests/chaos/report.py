"""What is said of a run of chaos: figures, then what was wrong, then how to do it again."""

from collections.abc import Iterator

from accounting.contract.money import format_credits
from tests.chaos.run import Run

LONGEST_LIST = 20


def lines(run: Run) -> Iterator[str]:
    noted, injector, books = run.noted, run.injector, run.books
    yield f"chaos: seed {run.seed}, {run.seconds:.0f} s under load"
    counts = noted.counts
    told = ("requests", "streams", "whole", "left by their clients", "connections refused or reset")
    yield "  " + ", ".join(f"{name} {counts[name]}" for name in told)
    statuses = sorted(name for name in counts if name.startswith(("status", "no answer")))
    yield "  " + ", ".join(f"{name}: {counts[name]}" for name in statuses)
    deeds = ", ".join(f"{name} {count}" for name, count in sorted(run.people.done.items()))
    yield f"  operators: {deeds}"
    parts = ", ".join(f"{name} {count}" for name, count in sorted(run.site.restarts.items()))
    yield f"  restarts: {parts or 'none'}"
    yield f"  faults: {injector.struck.total()}; seconds until served, and posted (p50, max):"
    for kind in sorted(injector.struck):
        taken = figures(injector.recoveries.get(kind, []))
        yield f"    {kind:30}{injector.struck[kind]:4}  {taken}"
    yield f"  Redis lost {injector.lost_bytes} bytes of its file"
    yield f"  wallets looked at {books.samples} times, the lowest {books.lowest_ucr} µcr"
    charged, said = format_credits(books.charged_ucr), format_credits(books.told_ucr)
    yield f"  charged {charged} credits; of that clients read {said}, request by request"
    yield f"  served beyond wallets: {books.receivable_ucr} µcr"
    yield f"  drift: {sum(line.startswith('DRIFT') for line in books.audit.splitlines())}"
    yield f"  promises broken: {len(run.wrong)}"
    for text in run.wrong[:LONGEST_LIST]:
        yield f"    {text}"


def figures(recoveries: list[tuple[float, float]]) -> str:
    if not recoveries:
        return "–"
    shown = []
    for which in (0, 1):
        seconds = sorted(one[which] for one in recoveries)
        shown.append(f"{seconds[len(seconds) // 2]:5.2f} {seconds[-1]:5.2f}")
    return "   ".join(shown)
