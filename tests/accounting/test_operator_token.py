"""The operator's token: set, or made once in the data directory."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from accounting.contract.settings import Secret, Settings, SettingsError
from accounting.operator_token import operator_token


def test_the_token_that_was_set_counts(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path), operator_token=Secret("mine"))
    assert operator_token(settings).reveal() == "mine"
    assert not list(tmp_path.iterdir())


def test_a_token_is_made_once_and_private(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path / "new"))
    with ThreadPoolExecutor(8) as threads:
        found = {token.reveal() for token in threads.map(operator_token, [settings] * 32)}
    assert len(found) == 1 and len(found.pop()) == 43
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["operator_token"]
    assert os.stat(tmp_path / "new" / "operator_token").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kept", ["", "  \n", "two words", "ümlaut"])
def test_a_token_that_cannot_be_sent_is_refused(tmp_path: Path, kept: str) -> None:
    (tmp_path / "operator_token").write_text(kept, "utf-8")
    with pytest.raises(SettingsError, match="operator_token: expected printable"):
        operator_token(Settings(data_dir=str(tmp_path)))


def test_a_directory_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"^TOLLGATE_DATA_DIR: operator token: "):
        operator_token(Settings(data_dir=str(tmp_path / "file" / "below")))
