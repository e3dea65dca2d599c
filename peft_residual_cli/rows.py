"""The rows of a JSONL file, checked one by one before a model is loaded: errors name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row: what is given, and the answer to learn. Both are texts, or both are messages."""

    line: int
    prompt: str | list[Message]
    completion: str | list[Message]

    @property
    def is_chat(self) -> bool:
        """Whether the row needs a chat template."""
        return isinstance(self.prompt, list)

    def as_chat(self) -> Row:
        """The same row as messages of a user and an assistant."""
        if not isinstance(self.prompt, str):
            return self
        prompt = [{"role": "user", "content": self.prompt}]
        return Row(self.line, prompt, [{"role": "assistant", "content": self.completion}])


def read_rows(path: str, option: str) -> list[list[Row]]:
    """Read a JSONL file with the columns `messages`, or `prompt` and `completion`.

    Args:
        path (`str`): The file.
        option (`str`): The option that names it, for messages.

    Returns:
        `list[list[Row]]`: For each line what is learned from it. A conversation gives a row for each turn of the
        assistant, with all earlier messages as its prompt: the model is trained on what it sees when it answers, with
        any chat template.

    Raises:
        ValueError: If the file is missing or empty, or a row is damaged or has nothing to learn.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"`{option}`: there is no file `{path}`. Check the path.")
    found = []
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found.append(list(_rows_of(line, number, path)))
    except UnicodeDecodeError as error:
        raise ValueError(f"`{option}`: `{path}` is not UTF-8 text ({error}). Convert it.") from error
    if not found:
        raise ValueError(f"`{option}`: `{path}` is empty. It needs one JSON object per line.")
    return found


def _rows_of(line: str, number: int, path: str) -> Iterator[Row]:
    where = f"Line {number} of `{path}`"
    try:
        row = json.loads(line.strip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} (column {error.colno}). Correct or remove it.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object, but {type(row).__name__}. Write {{...}} with named columns.")
    if row.get("tools"):
        raise ValueError(f"{where} has `tools`, which this command does not pass on. Use SFTTrainer in Python.")
    if "messages" in row:
        yield from _turns(_messages(row["messages"], "messages", where), number, where)
        return
    if missing := [name for name in ("prompt", "completion") if name not in row]:
        raise ValueError(
            f"{where} has no column `{missing[0]}`, but {sorted(row)}. Rename the columns: `messages`, or `prompt` "
            "and `completion`."
        )
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        answer = _messages(completion, "completion", where)
        if [message["role"] for message in answer] != ["assistant"]:
            raise ValueError(
                f"{where}: `completion` must be one message of the assistant. Use `messages` for several."
            )
        yield from list(_turns([*_messages(prompt, "prompt", where), *answer], number, where))[-1:]
    elif not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(f"{where}: `prompt` and `completion` must be two texts or two lists of messages.")
    elif not completion.strip():
        raise ValueError(f"{where} has nothing to learn: `completion` is empty. Fill it in or remove the line.")
    else:
        yield Row(number, prompt, completion)


def _messages(messages: Any, column: str, where: str) -> list[Message]:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise ValueError(
            f'{where}: `{column}` must be a list of {{"role": ..., "content": ...}} with texts, got '
            f"{json.dumps(messages)[:60]}."
        )
    return messages


def _turns(messages: list[Message], number: int, where: str) -> Iterator[Row]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(
            f"{where} has nothing to learn: no message has the role `assistant`. Add its answer or remove the line."
        )
    for i in answers:
        if not messages[i]["content"].strip():
            raise ValueError(f"{where} has nothing to learn: message {i + 1}, of the assistant, is empty. Fill it in.")
        if i == 0:
            raise ValueError(f"{where} starts with the assistant. Put a message of the user before it.")
        yield Row(number, messages[:i], messages[i : i + 1])
