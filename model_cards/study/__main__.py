# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""`python -m model_cards.study`: trains small models of every kind and compares their recall, loss and usage."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from ham_hf.cli.arguments import CommandError, Parser, exit_status, failing_as, number
from ham_hf.cli.libraries import import_transformers
from ham_hf.cli.models import pick_device

STUDIES = Path(__file__).parent

EXAMPLES = """\
examples:
  python -m model_cards.study cpu --output my-study --parts recall gradients
  python -m model_cards.study cpu --output my-study --corpus CORPUS --tokenizer TOKENIZER
  python -m model_cards.study my-study.yaml --output my-study --device cuda
  python -m model_cards.study cpu --output model_cards/study --report

STUDY is cpu, gpu or a YAML file like theirs. Every model's result is added to OUTPUT/PART.jsonl when it is done,
so the same command resumes an interrupted study. Only language and selection need CORPUS and TOKENIZER, which are
written by python -m model_cards.ham_tiny.corpus and python -m model_cards.ham_tiny.tokenizer.
"""


def build_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog="python -m model_cards.study",
        description="Trains small models of every kind, and reports their recall, usage and loss in tables and plots.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole = number("a whole number from 1", 1, 2**31, int)
    parser.add_argument("study", metavar="STUDY", help="cpu, gpu or a YAML file")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for results and plots")
    parser.add_argument("--parts", metavar="PART", nargs="+", help="parts of the study (default: all)")
    parser.add_argument("--corpus", metavar="DIR", type=Path, help="folder of the text, which language needs")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="folder of its tokenizer")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, ...")
    parser.add_argument("--threads", metavar="N", type=whole, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--report", action="store_true", help="train nothing: report all stored results")
    return parser


def execute(arguments: argparse.Namespace) -> None:
    """Trains the missing models, and writes the report."""
    if arguments.report and arguments.parts:
        raise CommandError("argument --parts: not with --report, which covers all parts that have results")
    if find_spec("matplotlib") is None:  # checked before the training, not after it
        raise CommandError("the plots need matplotlib, which the extra `eval` brings: pip install 'ham-hf[eval]'")
    if not Path(arguments.study).is_file() and not (STUDIES / f"{arguments.study}.yaml").is_file():
        known = ", ".join(sorted(x.stem for x in STUDIES.glob("*.yaml")))
        raise CommandError(
            f"argument STUDY: there is no file {arguments.study!r}, takes a YAML file or one of {known}"
        )
    import_transformers()
    import torch

    from .language import Texts
    from .report import write_report
    from .results import check_results, read_results
    from .study import OF_TEXT, jobs_of, parts_of, read_study, run_study

    with failing_as("argument STUDY"):
        study = read_study(arguments.study)
    parts = arguments.parts or parts_of(study)
    for part in parts:
        if part not in study:
            raise CommandError(f"argument --parts: got {part!r}, takes some of {', '.join(study.keys() - {'arms'})}")
    texts = None
    of_text = [part for part in parts if part in OF_TEXT]
    if of_text and not arguments.report:
        if arguments.corpus is None or arguments.tokenizer is None:
            raise CommandError(f"argument --corpus: {of_text[0]} needs it and --tokenizer; or give other --parts")
        with failing_as("argument --corpus"):
            texts = Texts(arguments.corpus, arguments.tokenizer)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with failing_as("argument STUDY"):
        jobs = list(jobs_of(study))
    with failing_as("argument --output"):
        check_results(jobs, arguments.output)
    if not arguments.report:
        wanted = [job for job in jobs if job.part in parts]
        run_study(wanted, arguments.output, texts, str(pick_device(arguments.device)))
    with failing_as("argument --output"):
        written = write_report(read_results(jobs, arguments.output), list(study["arms"]), arguments.output)
    print((arguments.output / "study.md").read_text())
    print(f"Wrote {', '.join(map(str, written))}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, see `exit_status`."""
    hint = "a smaller `model` or a smaller batch in STUDY needs less"
    return exit_status("study", lambda: execute(build_parser().parse_args(argv)), hint)


if __name__ == "__main__":
    sys.exit(main())
