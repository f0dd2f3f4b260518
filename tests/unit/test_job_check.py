"""What a dataset's first row tells before a job is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.jobs import spec
from trainer_service.jobs.check import _dataset, _enough
from trainer_service.jobs.spec import Dataset

CHAT = [{"role": "user", "content": "2 + 3"}]


def wrong(**dataset: Any) -> dict[str, str]:
    """What is wrong with a job that has this dataset, by field."""
    return {one.field: one.description for one in _dataset(spec(dataset=dataset))}


@pytest.mark.parametrize("prompt", ["2 + 3", CHAT])
def test_a_prompt_is_text_or_a_chat(tmp_path: Path, prompt: Any) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n" + json.dumps({"question": prompt, "answer": 5}) + "\n{no second line is read")
    pyarrow.parquet.write_table(pyarrow.table({"question": [prompt], "answer": [5]}), table)
    for source in ({"json_lines": str(lines)}, {"parquet": str(table)}):
        assert wrong(**source, columns={"question": "prompt"}) == {}
        assert wrong(**source) == {
            "job.dataset.columns": "no column is the prompt: there are question, answer"
        }
        found = wrong(**source, columns={"qestion": "prompt", "question": "prompt"})
        assert found == {"job.dataset.columns.qestion": "there is no such column: question, answer"}


@pytest.mark.parametrize("prompt", [3, [], [3], {"role": "user"}, True])
def test_a_prompt_of_another_type(tmp_path: Path, prompt: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": prompt}))
    text = f"prompt is neither text nor a list of messages in its first row: {prompt!r}"
    assert wrong(json_lines=str(file)) == {"job.dataset.json_lines": text}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "its first line is no JSON object"),
        ("\n \n", "its first line is no JSON object"),
        ("[1]", "its first line is no JSON object"),
        ("{", "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_a_file_that_has_no_row(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    assert wrong(json_lines=str(file)) == {"job.dataset.json_lines": text}


def test_a_dataset_has_the_prompts_of_one_generation(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text('{"prompt": "a"}\n\n{"prompt": "b"}')
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), table)
    for source, field in (
        ({"json_lines": str(lines)}, "job.dataset.json_lines"),
        ({"parquet": str(table)}, "job.dataset.parquet"),
        ({"reasoning_gym": {"task": "basic_arithmetic", "size": 2}}, "job.dataset.reasoning_gym.size"),
    ):
        data = Dataset.model_validate(source)
        assert list(_enough(data, 2)) == []
        (found,) = _enough(data, 3)
        assert (found.field, found.description) == (field, "has 2 prompts, and one generation takes 3")
    for gone in ("json_lines", "parquet"):  # which is told by another check
        assert list(_enough(Dataset.model_validate({gone: "/nowhere"}), 3)) == []


def test_a_table_that_has_no_row(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), file)
    assert wrong(parquet=str(file)) == {"job.dataset.parquet": "it has no rows"}
    file.write_text("no table")
    assert "not a parquet file" in wrong(parquet=str(file))["job.dataset.parquet"]
