"""Write `docs/architectures.md`: the oracle's verdicts for every small architecture, and those of stock PEFT.

    python tests/architectures_report.py

Takes ten minutes on one core. Finished models are kept in the output file, and not repeated.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import oracle
import transformers
import zoo
from tqdm.auto import tqdm


SIGNS = {oracle.RIGHT: "✓", oracle.REFUSED: "r", oracle.NOT_APPLICABLE: "·", oracle.FAILS: "!", oracle.WRONG: "✗"}
TITLES = {
    "CAUSAL_LM": "Causal language models",
    "SEQ_2_SEQ_LM": "Encoder-decoder models",
    "SEQ_CLS": "Sequence classification",
    "TOKEN_CLS": "Token classification",
    "QUESTION_ANS": "Question answering",
}
PAGE = """# Architectures

Written by `make architectures` with transformers {transformers} and PEFT {peft}; change that, not this page.

A prompt made of real words' embeddings must give what the base model gives for those words in front of the text: the
same outputs, losses, gradients and generated tokens, row by row. This was tried on every model type of transformers
that can be built with two small layers and random weights, {tried} classes in all.

| | right | refused | not applicable | fails | silently wrong |
|---|---:|---:|---:|---:|---:|
{summary}

*Right*: as the base model. *Refused*: an error of this package that names the architecture or the setting, and what to
do. *Not applicable*: the base model itself cannot do it, or is not exact in it (such as padding in some recurrent
models). *Fails*: another error.

Where PEFT is right, in `forward` too, and this package is not: {worse}.

In the tables, each cell shows this package's verdict and then that of PEFT's prompt tuning: ✓ right, r refused,
· not applicable, ! fails, ✗ silently wrong. A dash means that the adapter cannot be built.

A model that reads `input_ids` for more than the word embeddings is refused when the adapter is built, by running it
on five tokens and on their embeddings ([limits](limits.md)).
"""


def run(path: Path) -> dict[tuple[str, str], dict]:
    """Check every member of the zoo that is not yet in the file, and return all records."""
    transformers.logging.set_verbosity_error()
    lines = path.read_text().splitlines() if path.exists() else []
    found = {(record["task"], record["kind"]): record for record in map(json.loads, lines)}
    missing = [
        (task, kind, name)
        for task in zoo.MAPPINGS
        for kind, name in zoo.members(task)
        if kind not in zoo.NOT_BUILT[task] and (task, kind) not in found
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for task, kind, name in tqdm(missing, desc="models"):
            base = zoo.build(kind, name)
            record = {"task": task, "kind": kind, "name": name}
            record |= {"ours": oracle.verdicts(base, task), "stock": oracle.verdicts(base, task, stock=True)}
            file.write(json.dumps(record) + "\n")
            file.flush()
            found[task, kind] = record
    return found


def page(found: dict[tuple[str, str], dict]) -> str:
    """Format the page."""
    verdicts = {
        who: [verdict for record in found.values() for verdict, _ in record[who].values()] for who in ("ours", "stock")
    }
    order = (oracle.RIGHT, oracle.REFUSED, oracle.NOT_APPLICABLE, oracle.FAILS, oracle.WRONG)
    summary = [
        f"| {label} | " + " | ".join(f"{verdicts[who].count(verdict):,}" for verdict in order) + " |"
        for who, label in (("ours", "peft-residual"), ("stock", "PEFT's prompt tuning"))
    ]
    worse = [
        f"`{record['name']}` ({check.replace('_', ' ')})"
        for record in found.values()
        for check, (verdict, _) in record["stock"].items()
        if verdict == oracle.RIGHT
        and check != "build"
        and record["stock"]["forward"][0] == oracle.RIGHT
        and record["ours"].get(check, record["ours"]["build"])[0] not in (oracle.RIGHT, oracle.NOT_APPLICABLE)
    ]
    text = PAGE.format(
        transformers=version("transformers"),
        peft=version("peft"),
        tried=len(found),
        summary="\n".join(summary),
        worse=", ".join(worse) or "nowhere",
    )
    for task, title in TITLES.items():
        checks = oracle.CHECKS[task]
        text += f"\n## {title}\n\n| | {' | '.join(check.replace('_', ' ') for check in checks)} |\n"
        text += "|---|" + ":---:|" * len(checks) + "\n"
        notes = []
        for (of_task, kind), record in sorted(found.items()):
            if of_task != task:
                continue
            cells = [
                "".join(SIGNS.get(record[who].get(check, ("", ""))[0], "-") for who in ("ours", "stock"))
                for check in checks
            ]
            text += f"| {kind} | {' | '.join(cells)} |\n"
            if record["ours"]["build"][0] != oracle.RIGHT:
                notes.append(f"- `{record['name']}`: {record['ours']['build'][1].split('. ')[0]}.\n")
        text += "\n" + "".join(notes) if notes else ""
        if zoo.NOT_BUILT[task]:
            text += f"\nNot built, see `tests/zoo.py`: {', '.join(sorted(zoo.NOT_BUILT[task]))}.\n"
    return text


def main() -> None:
    """Parse the options, check the models and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/architectures.jsonl"), help="(default %(default)s)")
    parser.add_argument("--page", type=Path, default=Path("docs/architectures.md"), help="(default %(default)s)")
    options = parser.parse_args()
    options.page.write_text(page(run(options.output)))


if __name__ == "__main__":
    main()
