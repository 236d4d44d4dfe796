# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""The command `ham-hf`: checks its arguments and hands over to what continues, describes, uploads or runs a model."""

import argparse
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from ham_hf import __version__

if TYPE_CHECKING:
    from ham_hf.inspection.runs import Setting

EMBEDDED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "ham-tiny"
DEMO_USAGES = (1.0, 0.5, 0.25, 0.1, 0.0)
DEMO_THRESHOLDS = (0.0, 0.4, 0.5, 0.6, 2.0)

GENERATE_EXAMPLES = """\
examples:
  ham-hf generate "It was a dark night, and Captain Ahab" --threshold 0 0.5 2
  ham-hf generate --prompt-file letter.txt --kv-usage 1 0.25 0 --score
  cat letter.txt | ham-hf generate --prompt-file - --kv-budget 64 --temperature 0.8

A token is kept where its routing score (0 to 1) reaches the threshold: 0 keeps every token, more than 1 keeps none.
Put PROMPT before --threshold and --kv-usage, which take every number that follows them.
"""
CARD_EXAMPLES = """\
examples:
  ham-hf card my-ham
  ham-hf card my-ham --results my-results --repo-id OWNER/my-ham
  ham-hf card my-ham --output card.md --force

Each of these files in --results adds what it says; the card tells what none says:
  usage.json, usage.png   loss and memory, from python -m ham_hf.evaluation.usage
  summary.md, data.md, recipe.md, results.md, limits.md   prose
  card.json   any of "name", "license", "language": ["en"], "datasets": [...], "tags": [...] and
              "evaluation": {"dataset": what the loss was measured on, "type": its name on the Hub, "split": ...}
"""
PUSH_EXAMPLES = """\
examples:
  ham-hf push my-ham OWNER/my-ham --private
  ham-hf push my-ham OWNER/my-ham --revision trial

The card is CHECKPOINT/README.md (see ham-hf card), else the one that the repository has, else one made of what lies in
CHECKPOINT. Needs a token that may write: hf auth login, or the environment variable HF_TOKEN.
"""
TRAIN_EXAMPLES = """\
examples:
  ham-hf train recipe.yaml
  accelerate launch --num_processes 2 -m ham_hf.cli train recipe.yaml   (two GPUs)
  torchrun --nproc-per-node 2 -m ham_hf.cli train recipe.yaml           (two processes on a CPU, with use_cpu: true)

Run it again to go on where it was interrupted. A recipe to start from: ham_hf/training/examples/small.yaml
"""
STUDY_EXAMPLES = """\
examples:
  ham-hf study cpu --output my-study --parts recall gradients
  ham-hf study cpu --output my-study --corpus CORPUS --tokenizer TOKENIZER
  ham-hf study my-study.yaml --output my-study --device cuda
  ham-hf study cpu --output model_cards/study --report

STUDY is cpu, gpu or a YAML file like theirs. Every model's result is stored in OUTPUT when it is done, so the same
command goes on where it was interrupted. CORPUS and TOKENIZER, which only language needs, are written by
python -m ham_hf.training.corpus and python -m ham_hf.training.tokenizer.
"""
MAIN_DESCRIPTION = """\
Hybrid Associative Memories: language models whose KV cache
keeps only the tokens that their RNN predicts badly.
"""
MAIN_EXAMPLES = """\
examples:
  ham-hf demo
  ham-hf generate "It was a dark night, and Captain Ahab" --threshold 0 0.5 2
  ham-hf card my-ham --results my-results
  ham-hf push my-ham OWNER/my-ham
  ham-hf train recipe.yaml
  ham-hf run transformers serve path/to/checkpoint
"""
RUN_EXAMPLES = """\
examples:
  ham-hf run lm_eval --model hf --model_args pretrained=path/to/checkpoint,threshold=0.3 --tasks lambada_openai
  ham-hf run transformers serve path/to/checkpoint --port 8000
"""


class CommandError(Exception):
    """What the user is told in one line when a command cannot be carried out."""


class Parser(argparse.ArgumentParser):
    """A parser that explains an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises the error for `main` to print."""
        raise CommandError(message)


def number(expected: str, low: float, high: float, convert: type = float) -> Callable[[str], Any]:
    """An argparse type: a number from `low` to `high`; anything else is answered with what was `expected`."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
            valid = low <= value <= high  # false for NaN
        except ValueError:
            valid = False
        if not valid:
            shown = textwrap.shorten(text, 40, placeholder=" ...")
            raise argparse.ArgumentTypeError(f"got {shown!r}, takes {expected}")
        return value

    return parse


def build_parser() -> Parser:
    """The parser of every command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="ham-hf",
        description=MAIN_DESCRIPTION,
        epilog=MAIN_EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ham-hf {__version__}")
    commands = parser.add_subparsers(
        metavar="generate|demo|train|study|card|push|run", title="commands", dest="command", required=True
    )
    add_command = partial(commands.add_parser, formatter_class=raw, allow_abbrev=False)
    generate = add_command(
        "generate",
        help="continue a prompt, once for each threshold",
        description="Continues a prompt, once for each threshold, and compares what the cache kept.",
        epilog=GENERATE_EXAMPLES,
    )
    add_generate_arguments(generate)
    demo = add_command(
        "demo",
        help="continue a built-in story while the cache shrinks",
        description="Continues a built-in story at five cache sizes, from every token kept to none.",
    )
    add_model_arguments(demo, max_new_tokens=40)
    # So small a model repeats itself when it always takes the likeliest token.
    demo.set_defaults(execute=demo_command, temperature=0.7)
    train = add_command(
        "train",
        help="train a model by a recipe, or go on with it",
        description="Trains a HAM as a YAML file describes, on one process or, under accelerate, on many.",
        epilog=TRAIN_EXAMPLES,
    )
    train.add_argument("recipe", metavar="RECIPE", help="YAML file; its keys are those of ham_hf.training.recipe")
    train.set_defaults(execute=train_command)
    card = add_command(
        "card",
        help="write the model card of a checkpoint",
        description="Writes the model card of a checkpoint from its files and what was measured of it.",
        epilog=CARD_EXAMPLES,
    )
    add_card_arguments(card)
    push = add_command(
        "push",
        help="upload a checkpoint with its card and code to the Hub",
        description="Uploads a checkpoint, its card, and the code that loads it without this package, in one commit.",
        epilog=PUSH_EXAMPLES,
    )
    add_push_arguments(push)
    study = add_command(
        "study",
        help="train small models of every kind and compare what they recall and keep",
        description="Trains small models of every kind, and tells and draws what they recall, keep and predict.",
        epilog=STUDY_EXAMPLES,
    )
    add_study_arguments(study)
    run = add_command(
        "run",
        help="run another package's command with HAM known to Transformers",
        description="Runs the command of another installed package in a process whose Auto classes know HAM.",
        epilog=RUN_EXAMPLES,
    )
    run.add_argument("tool", metavar="TOOL", help="name of the command, such as lm_eval or transformers")
    run.add_argument("tool_arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    run.set_defaults(execute=run_command)
    return parser


def add_generate_arguments(parser: Parser) -> None:
    """Adds the arguments of `generate`."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to continue")
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="read the prompt from a UTF-8 file, or from stdin if '-'"
    )
    threshold = number("numbers such as 0 0.5 2 (PROMPT goes before them)", -math.inf, math.inf)
    usage = number("fractions from 0 to 1 (PROMPT goes before them)", 0, 1)
    help_text = "keep the tokens whose score reaches X (default: the checkpoint's own thresholds)"
    parser.add_argument("--threshold", metavar="X", nargs="+", type=threshold, help=help_text)
    help_text = "keep about this fraction of the tokens instead, on a calibrated checkpoint"
    parser.add_argument("--kv-usage", metavar="U", nargs="+", type=usage, help=help_text)
    budget = number("a whole number from 1", 1, 2**31, int)
    help_text = "keep at most N tokens a head: when it is full, the lowest score leaves"
    parser.add_argument("--kv-budget", metavar="N", type=budget, help=help_text)
    help_text = "also measure the loss (nats a token) on the second half of the prompt"
    parser.add_argument("--score", action="store_true", help=help_text)
    add_model_arguments(parser, max_new_tokens=60)
    parser.set_defaults(execute=generate_command)


def add_model_arguments(parser: Parser, max_new_tokens: int) -> None:
    """Adds the arguments that every command shares."""
    whole = number("a whole number from 1", 1, 2**31, int)
    help_text = "folder of a HAM checkpoint, or its name on the Hub (default: the one in this package)"
    parser.add_argument("--model", metavar="PATH_OR_ID", default=str(EMBEDDED_CHECKPOINT), help=help_text)
    help_text = "length of the continuation (default: %(default)s)"
    parser.add_argument("--max-new-tokens", metavar="N", type=whole, default=max_new_tokens, help=help_text)
    temperature = number("a number from 0 to 1000", 0, 1000)
    help_text = "sample at this temperature; 0 takes the likeliest token (default: %(default)s)"
    parser.add_argument("--temperature", metavar="T", type=temperature, default=0.0, help=help_text)
    seed = number("a whole number from 0 to 2^64 - 1", 0, 2**64 - 1, int)
    parser.add_argument(
        "--seed", metavar="S", type=seed, default=0, help="seed of the sampling (default: %(default)s)"
    )
    help_text = "auto (a GPU if there is one), cpu, cuda, cuda:1, ... (default: %(default)s)"
    parser.add_argument("--device", default="auto", help=help_text)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    help_text = "type of the weights: %(choices)s (default: auto, the checkpoint's)"
    parser.add_argument("--dtype", metavar="DTYPE", choices=dtypes, default="auto", help=help_text)


def add_card_arguments(parser: Parser) -> None:
    """Adds the arguments of `card`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a HAM checkpoint")
    help_text = "folder with what was measured and written about it (default: CHECKPOINT)"
    parser.add_argument("--results", metavar="DIR", type=Path, help=help_text)
    help_text = "where the card goes, usage.png beside it (default: CHECKPOINT/README.md)"
    parser.add_argument("--output", metavar="FILE", type=Path, help=help_text)
    help_text = "the name on the Hub, for the examples in the card (default: a placeholder)"
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help=help_text)
    parser.add_argument("--force", action="store_true", help="replace a card that this command did not write")
    parser.set_defaults(execute=card_command)


def add_push_arguments(parser: Parser) -> None:
    """Adds the arguments of `push`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a HAM checkpoint")
    help_text = "repository on the Hub, made if it is not there"
    parser.add_argument("repo_id", metavar="OWNER/NAME", help=help_text)
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if it is not there (default: the main one)")
    help_text = "make a new repository private (default: as the owner's settings say)"
    parser.add_argument("--private", action="store_true", default=None, help=help_text)
    parser.add_argument("--message", metavar="TEXT", help="first line of the commit")
    parser.set_defaults(execute=push_command)


def add_study_arguments(parser: Parser) -> None:
    """Adds the arguments of `study`."""
    whole = number("a whole number from 1", 1, 2**31, int)
    parser.add_argument("study", metavar="STUDY", help="cpu, gpu or a YAML file")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="where results and plots go")
    parser.add_argument("--parts", metavar="PART", nargs="+", help="of the study (default: all)")
    parser.add_argument("--corpus", metavar="DIR", type=Path, help="folder of the text, for language")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="folder of its tokenizer, for language")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, ...")
    parser.add_argument("--threads", metavar="N", type=whole, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--report", action="store_true", help="train nothing: tell and draw all that is stored")
    parser.set_defaults(execute=study_command)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 (out of memory), 2 (a wrong call) or 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?", not a traceback
    try:
        arguments = build_parser().parse_args(argv)
        arguments.execute(arguments)
    except CommandError as error:
        print(f"ham-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # On a terminal the text stops amid a line.
        print("\n" * sys.stdout.isatty() + "ham-hf: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            "ham-hf: error: out of memory; a shorter prompt, --kv-budget or --dtype bfloat16 needs less",
            file=sys.stderr,
        )
        return 1
    return 0


def generate_command(arguments: argparse.Namespace) -> None:
    """`ham-hf generate`."""
    prompt = read_prompt(arguments)
    settings = settings_of(arguments)
    model, tokenizer = load(arguments)
    if settings[0].name == "kv_usage" and not calibrated(model):
        raise CommandError(
            f"argument --kv-usage: the checkpoint {arguments.model} has no score quantiles to choose thresholds by; "
            "takes a checkpoint saved after ham_hf.evaluation.calibrate, or give --threshold instead"
        )
    compare(arguments, model, tokenizer, prompt, settings, arguments.score)


def demo_command(arguments: argparse.Namespace) -> None:
    """`ham-hf demo`."""
    from ham_hf.inspection.demo_prompt import DEMO_INTRODUCTION, DEMO_PROMPT
    from ham_hf.inspection.runs import Setting

    model, tokenizer = load(arguments)
    settings = [Setting("threshold", x) for x in DEMO_THRESHOLDS]
    if calibrated(model):
        settings = [Setting("kv_usage", x) for x in DEMO_USAGES]
    print(f"{DEMO_INTRODUCTION}\n")
    compare(arguments, model, tokenizer, DEMO_PROMPT, settings, score=True)


def train_command(arguments: argparse.Namespace) -> None:
    """`ham-hf train`."""
    import datasets
    import huggingface_hub
    import transformers

    from ham_hf.training.recipe import read_recipe
    from ham_hf.training.trainer import train

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with failing_as(f"argument RECIPE: {arguments.recipe}", width=400):
        recipe = read_recipe(arguments.recipe)
        trained = train(recipe)
    if os.environ.get("RANK", "0") != "0":
        return
    if trained is None:
        print(f"Stopped and saved in {recipe.output}. The same command goes on from there.")
        raise KeyboardInterrupt
    print(f"The trained model is in {trained}")


def card_command(arguments: argparse.Namespace) -> None:
    """`ham-hf card`."""
    from huggingface_hub.constants import REPOCARD_NAME

    from ham_hf.files import copy_whole, write_whole
    from ham_hf.hub.card import MARKER, build_card, missing_from
    from ham_hf.hub.checkpoint import read_checkpoint
    from ham_hf.hub.push import check_repo_id
    from ham_hf.hub.sources import read_sources

    with failing_as("argument CHECKPOINT"):
        checkpoint = read_checkpoint(arguments.checkpoint)
    with failing_as("argument --results"):
        sources = read_sources(arguments.results or arguments.checkpoint)
    if arguments.repo_id is not None:
        with failing_as("argument --repo-id"):
            check_repo_id(arguments.repo_id)
    output = arguments.output or arguments.checkpoint / REPOCARD_NAME
    with failing_as(f"argument --output: cannot write {output}"):
        if output.is_file() and MARKER not in output.read_text(encoding="utf-8") and not arguments.force:
            raise CommandError(
                f"argument --output: {output} was not written by this command; takes another FILE, or --force to "
                "replace it"
            )
        name = sources.metadata.get("name", arguments.checkpoint.resolve().name)
        write_whole(output, str(build_card(checkpoint, sources, name, arguments.repo_id)))
        if sources.plot is not None and sources.plot.parent.resolve() != output.parent.resolve():
            copy_whole(sources.plot, output.parent / sources.plot.name)
            print(f"Copied {sources.plot.name} beside it")
    print(f"Wrote {output}: {sum(checkpoint.parameters.values()):,} parameters")
    missing = missing_from(sources, arguments.repo_id)
    if missing:
        print(f"The card says less for want of: {', '.join(missing)}")


def push_command(arguments: argparse.Namespace) -> None:
    """`ham-hf push`."""
    from huggingface_hub.errors import HfHubHTTPError

    from ham_hf.hub.push import push_folder

    with failing_as(f"cannot push {arguments.checkpoint} to {arguments.repo_id}"):
        try:
            pushed = push_folder(
                arguments.checkpoint,
                arguments.repo_id,
                private=arguments.private,
                revision=arguments.revision,
                commit_message=arguments.message,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 401:
                raise
            raise CommandError(
                f"cannot push to {arguments.repo_id}: the Hub got no token that it knows, takes one that may write: "
                "hf auth login, or the environment variable HF_TOKEN"
            ) from error
    size = f"{len(pushed.files)} files ({pushed.size / 1e6:.1f} MB)"
    # True as well where nothing was new, so that no commit was made.
    print(f"{pushed.repo_id} holds the checkpoint, {size}, in one commit:")
    print(pushed.commit.commit_url)
    print(f"To load this state and no later one: revision={pushed.commit.oid!r}")
    print(f"Card: {pushed.card}")
    if pushed.code:
        print(f"Code: added {', '.join(pushed.code)}, which the folder lacked")
    if not any(name.startswith("tokenizer") for name in pushed.files):
        print("The folder holds no tokenizer")
    if pushed.left_out:
        print(f"Left out: {', '.join(pushed.left_out)}")


def study_command(arguments: argparse.Namespace) -> None:
    """`ham-hf study`."""
    import torch

    from ham_hf.evaluation.study.language import Texts
    from ham_hf.evaluation.study.report import write_report
    from ham_hf.evaluation.study.study import check_results, jobs_of, parts_of, read_results, read_study, run_study

    with failing_as("argument STUDY"):
        study = read_study(arguments.study)
    if arguments.report and arguments.parts:
        raise CommandError("argument --parts: not with --report, which tells of all parts that have results")
    if find_spec("matplotlib") is None:  # found out before the training, not behind it
        raise CommandError("the plots need matplotlib, which the extra `eval` brings: pip install 'ham-hf[eval]'")
    parts = arguments.parts or parts_of(study)
    for part in parts:
        if part not in study:
            raise CommandError(f"argument --parts: got {part!r}, takes some of {', '.join(study.keys() - {'arms'})}")
    texts = None
    if "language" in parts and not arguments.report:
        if arguments.corpus is None or arguments.tokenizer is None:
            raise CommandError("argument --corpus: language needs it and --tokenizer; or give other --parts")
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


def run_command(arguments: argparse.Namespace) -> None:
    """`ham-hf run`."""
    commands = entry_points(group="console_scripts", name=arguments.tool)
    if not commands:
        raise CommandError(
            f"argument TOOL: no installed package has a command {arguments.tool!r}, takes one such as lm_eval or "
            "transformers"
        )
    import transformers

    from ham_hf import HAMForCausalLM

    # `transformers serve` looks a model's class up here, by the name in config.json, and asks no Auto class.
    setattr(transformers, HAMForCausalLM.__name__, HAMForCausalLM)
    sys.argv = [arguments.tool, *arguments.tool_arguments]
    sys.exit(next(iter(commands)).load()())


def compare(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, prompt: str, settings: list["Setting"], score: bool
) -> None:
    """Runs the prompt at every setting, showing the text as it comes, then what the runs kept."""
    from ham_hf.inspection.comparison import Comparison
    from ham_hf.inspection.runs import run

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[1] == 0:
        raise CommandError("argument PROMPT: the model's tokenizer finds no token in it, takes other text")
    if score and ids.shape[1] < 2:
        raise CommandError("argument --score: got a prompt of 1 token, takes 2 or more")
    generation: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        generation["temperature"] = arguments.temperature
    comparison = Comparison(tokenizer, prompt)
    for setting in settings:
        streamer = comparison.start(setting)
        comparison.end(run(model, ids, setting, score, arguments.seed, streamer, **generation))
    comparison.conclude(model.config)


def settings_of(arguments: argparse.Namespace) -> list["Setting"]:
    """The settings that a call of `generate` asks for, one a run."""
    from ham_hf.inspection.runs import Setting

    if arguments.threshold and arguments.kv_usage:
        raise CommandError("argument --kv-usage: got it beside --threshold, takes its place: give one of the two")
    if arguments.threshold:
        return [Setting("threshold", x, arguments.kv_budget) for x in arguments.threshold]
    if arguments.kv_usage:
        return [Setting("kv_usage", x, arguments.kv_budget) for x in arguments.kv_usage]
    return [Setting(kv_budget=arguments.kv_budget)]


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt from the command line, a file or stdin."""
    prompt, source = arguments.prompt, arguments.prompt_file
    if prompt is None and source is None:
        raise CommandError("argument PROMPT: got none, takes the text to continue; or give --prompt-file FILE")
    if prompt is not None and source is not None:
        raise CommandError("argument --prompt-file: got it beside PROMPT, takes its place: give one of the two")
    if source is not None:
        try:
            prompt = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise CommandError(
                f"argument --prompt-file: cannot read {source!r}: {reason}; takes a UTF-8 file or -"
            ) from error
        prompt = prompt.removesuffix("\n")
    name = "PROMPT" if source is None else "--prompt-file"
    if not prompt.strip():
        raise CommandError(f"argument {name}: got an empty prompt, takes some text")
    if not prompt.isascii() and re.search("[\ud800-\udfff]", prompt):
        raise CommandError(f"argument {name}: got bytes that are not UTF-8, takes UTF-8 text")
    return prompt


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, ready on its device, and its tokenizer."""
    import huggingface_hub
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = pick_device(arguments.device)
    name = arguments.model
    check_model_name(name)
    with Console(stderr=True).status("Loading the model"):
        with failing_as(f"argument --model: cannot load a model from {name}"):
            model = load_model(name, arguments.dtype)
        with failing_as(f"argument --model: cannot load a tokenizer from {name}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if len(tokenizer) > model.config.vocab_size:
            sizes = f"{len(tokenizer)} tokens in its tokenizer and {model.config.vocab_size} embeddings"
            raise CommandError(f"argument --model: {name} has {sizes}, takes a checkpoint where they agree")
        return model.to(device), tokenizer


@contextmanager
def failing_as(message: str, width: int = 160) -> Iterator[None]:
    """Turns any failure into a `CommandError`: a broken checkpoint fails in as many ways as libraries read it."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), width, placeholder=" ...") or type(error).__name__
        raise CommandError(f"{message}: {reason}") from error


def load_model(name: str, dtype: str) -> Any:
    """The model of a checkpoint; refuses one that is not HAM, and one that lacks weights."""
    import torch
    from transformers import PreTrainedConfig

    from ham_hf import HAMForCausalLM

    kind = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if kind != "ham":
        raise CommandError(f"argument --model: {name} holds a model of type {kind!r}, takes a HAM model ('ham')")
    # Told to go on, `from_pretrained` says which shapes differ; by itself it would print a table.
    loaded: Any = HAMForCausalLM.from_pretrained(
        name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    model, report = loaded
    wrong = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if wrong:
        raise CommandError(
            f"argument --model: {name} lacks {len(wrong)} of the weights that its config.json asks for, "
            f"or has them in another shape, such as {wrong[0]}"
        )
    if not all(bool(torch.isfinite(x).all()) for x in model.parameters()):
        raise CommandError(f"argument --model: {name} holds weights that are not finite numbers")
    if model.config.num_hybrid_layers == 0:
        raise CommandError(f"argument --model: {name} has no layer of type 'hybrid', takes a model with at least one")
    return model


def check_model_name(name: str) -> None:
    """Refuses what can be neither a folder nor a name on the Hub, before anything is looked for online."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise CommandError(f"argument --model: the folder {name} holds no config.json, takes a HAM checkpoint")
    elif name == str(EMBEDDED_CHECKPOINT):
        raise CommandError(f"argument --model: this installation lacks its checkpoint {name}; give --model PATH_OR_ID")
    elif Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CommandError(
            f"argument --model: {name!r} is no folder, takes the folder of a HAM checkpoint or OWNER/NAME"
        )


def pick_device(name: str) -> Any:
    """The device to run on, tried out."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"argument --device: {name!r} is not to be had here, takes auto, cpu, cuda, ...") from error
    return torch.device(name)


def calibrated(model: Any) -> bool:
    """Whether the checkpoint holds the score quantiles that `kv_usage` needs."""
    mixers = [layer.mixer for layer in model.model.layers if layer.mixer.layer_type == "hybrid"]
    return all(bool((mixer.score_quantiles.amax(-1) > 0).all()) for mixer in mixers)


if __name__ == "__main__":
    sys.exit(main())
