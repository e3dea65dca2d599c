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
    "causal": "Causal language models",
    "image-text": "Image-text models, with text alone",
    "encoder-decoder": "Encoder-decoder models, and speech models with text alone",
    "sequence": "Sequence classification",
    "token": "Token classification",
    "question": "Question answering",
    "base": "Base models (feature extraction)",
}
PAGE = """# Architectures

Written by `make architectures` with transformers {transformers} and PEFT {peft}; change that, not this page.

A prompt made of real words' embeddings must give what the base model gives for those words in front of the text: the
same outputs, losses, gradients and generated tokens, row by row. This was tried on every model type of transformers
that can be built with two small layers and random weights and runs on text alone, {tried} classes in all. The others
are named below the tables.

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
    found = {(record["group"], record["kind"]): record for record in map(json.loads, lines)}
    missing = [
        (group, kind, name)
        for group in zoo.GROUPS
        for kind, name in zoo.members(group)
        if kind not in zoo.NOT_BUILT[group] and (group, kind) not in found
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for group, kind, name in tqdm(missing, desc="models"):
            base = zoo.build(kind, name)
            task = zoo.task_type(group, base)
            record = {"group": group, "kind": kind, "name": name}
            record |= {"ours": oracle.verdicts(base, task), "stock": oracle.verdicts(base, task, stock=True)}
            file.write(json.dumps(record) + "\n")
            file.flush()
            found[group, kind] = record
    return found


def not_built(group: str) -> str:
    """Name the model types of a group that are not in the zoo, each with what stops it.

    Raises:
        ValueError: If nothing does.
    """
    members, lines = dict(zoo.members(group)), []
    for kind in sorted(zoo.NOT_BUILT[group]):
        try:
            zoo.runs(zoo.build(kind, members[kind]))
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split())
            lines.append(f"- {kind}: {type(error).__name__}: {reason[:120]}\n")
        else:
            raise ValueError(f"{kind} builds and runs: take it out of NOT_BUILT[{group!r}] in tests/zoo.py.")
    return "".join(lines)


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
    for group, title in TITLES.items():
        checks = oracle.CHECKS[zoo.GROUPS[group][0]]
        text += f"\n## {title}\n\n| | {' | '.join(check.replace('_', ' ') for check in checks)} |\n"
        text += "|---|" + ":---:|" * len(checks) + "\n"
        notes = []
        for (of_group, kind), record in sorted(found.items()):
            if of_group != group:
                continue
            cells = [
                "".join(SIGNS.get(record[who].get(check, ("", ""))[0], "-") for who in ("ours", "stock"))
                for check in checks
            ]
            text += f"| {kind} | {' | '.join(cells)} |\n"
            if record["ours"]["build"][0] != oracle.RIGHT:
                notes.append(f"- `{record['name']}`: {record['ours']['build'][1].split('. ')[0]}.\n")
        text += "\n" + "".join(notes) if notes else ""
        if zoo.NOT_BUILT[group]:
            text += f"\nNot compared, and what stops it:\n\n{not_built(group)}"
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
