"""The command line: parsing only."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dcjax.cli.allocator import keep_freed_memory
from dcjax.errors import RunError
from dcjax.paths import local_path

RECIPES = Path("experiments")
INTERRUPTED = {
    "train": "; the same command goes on from the last checkpoint",
    "convert": "; nothing is left half-written",
}
SUITE_OPTIONS = ("data_dir", "samples", "problems", "max_response_length", "template", "seed", "slots", "devices")
SUITE_OPTIONS += ("against", "out", "coordinator", "num_processes", "process_id")
NO_CACHE = "--no-compilation-cache"
NO_CACHE_HELP = f"With {NO_CACHE}, any command compiles its programs anew, and keeps none."
OVERRIDE = re.compile(r"([a-z_][\w.-]*)=(.*)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0; 2 for an error that the user can mend; 75 where the run goes on when the same command is started again; 130 when
    interrupted at the keyboard.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if NO_CACHE in arguments:
        import jax

        jax.config.update("jax_enable_compilation_cache", False)
        arguments = [argument for argument in arguments if argument != NO_CACHE]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal without Greek shows a question mark
            stream.reconfigure(errors="replace")
    try:
        if arguments[:1] == ["train"]:
            _train(arguments[1:])
        else:
            options = _parser().parse_args(arguments)
            options.run(options)
    except (RunError, OSError, KeyboardInterrupt) as error:
        return _tell(error, " ".join(arguments[:1]))
    return 0


def _tell(error: BaseException, command: str) -> int:
    """Prints why a command ended, in one line where it is not a bug; returns the exit status."""
    match error:
        case RunError():
            told, status = f"error: {error}", error.status
        case OSError():
            told, status = f"error: {f'{error.filename}: {error.strerror}' if error.filename else error}", 2
        case KeyboardInterrupt():
            told, status = f"interrupted{INTERRUPTED.get(command, '')}", 130
        case _:
            traceback.print_exception(error)
            return 1
    print(f"dcjax: {' '.join(told.split())}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _computing():
    """Sets the process up for JAX's work; programs are kept, and told of while they are compiled."""
    _prepare()
    from dcjax.cli.compilation import keep_programs, told_of

    keep_programs()
    with told_of():
        yield


def _prepare() -> None:
    """Sets allocator and logging up, and imports the chatty libraries with their start-up messages kept quiet.

    TensorFlow, which JetStream brings along, logs from C++ before anything can be set, so the descriptor is turned.
    """
    keep_freed_memory()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # what Orbax logs of a failed save is raised too, and told in one line
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _leave_out_checkpoints_that_failed
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        importlib.import_module("jetstream.engine.engine_api")
        importlib.import_module("transformers")
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _leave_out_checkpoints_that_failed(unraisable) -> None:
    """Tells of errors that nobody can catch, but not of reads and writes that end after their checkpoint has failed."""
    error, source = unraisable.exc_value, unraisable.object
    is_late_write = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    is_late_read = inspect.iscoroutine(source) and "orbax" in source.cr_code.co_filename
    if not (is_late_write or is_late_read):
        sys.__unraisablehook__(unraisable)


class _Parser(argparse.ArgumentParser):
    """Whose arguments of type Path are what `local_path` makes of them, in every command."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message}; see {self.prog} --help")


def _path(text: str) -> Path:
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dcjax",
        description="RL of language models whose sampling policy is not the training policy.",
        epilog=NO_CACHE_HELP,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    commands.add_parser(
        "train", help="run a recipe, or resume it: dcjax train [RECIPE] [--section.field VALUE ...]", add_help=False
    )

    _add_evaluate(commands)
    _add_probe(commands)

    report = commands.add_parser("report", help="draw report.png and report.html from a run's metrics")
    report.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory")
    report.set_defaults(run=_report)

    _add_convert(commands)
    _add_data(commands)
    return parser


def _add_data(commands) -> None:
    data = commands.add_parser(
        "data",
        help="prepare and check local copies of DAPO-Math-17K and the benchmarks",
        description="Prepares the data sets that have a copy in DATA_DIR, and prints what was kept and dropped, "
        "evaluation questions that are in the training set, and answers that do not verify against themselves.",
    )
    data.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="holds the copies; docs/data.md tells how")
    data.add_argument("--names", nargs="+", metavar="NAME", help="which data sets (default: all)")
    data.add_argument("--download", action="store_true", help="fetch what has no copy from the Hugging Face Hub")
    data.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    data.set_defaults(run=_data)


def _add_evaluate(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy of both policies on held-out prompts, or on the papers' benchmarks",
        description="Samples once from each of a run's held-out prompts; with --suite, many times from each problem of "
        "benchmarks, of a Hugging Face folder too. docs/evaluation.md tells how to read the result.",
    )
    evaluate.add_argument(
        "source", type=Path, help="a run, one checkpoint in it (RUN/checkpoints/STEP), or an HF folder"
    )
    evaluate.add_argument("--prompts", type=int, help="held-out prompts, one sample each (default: the run's)")
    evaluate.add_argument("--temperature", type=float, help="0 is greedy (default: the run's; of a suite, 0.7)")
    evaluate.add_argument("--format", help="serving format of the deployed policy (default: the run's)")
    evaluate.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    evaluate.set_defaults(run=_evaluate)

    suite = evaluate.add_argument_group("suite", "goes on where it was stopped, when the same command is started again")
    suite.add_argument("--suite", metavar="NAME", help="paper: AIME24, AIME25, AMC23, MATH-500, Minerva, OlympiadBench")
    suite.add_argument("--data-dir", type=Path, metavar="DIR", help="the benchmarks' local copies (default: data)")
    suite.add_argument("--samples", type=int, metavar="K", help="a problem (default: 32 or 4, as the papers)")
    suite.add_argument("--problems", type=int, metavar="N", help="the first N of each benchmark (default: all)")
    suite.add_argument("--max-response-length", type=int, metavar="TOKENS", help="default: 32768")
    suite.add_argument("--template", help="how to ask: boxed or dapo (default: as the run was trained, or boxed)")
    suite.add_argument("--seed", type=int, help="of the samples (default: 0)")
    suite.add_argument("--slots", type=int, help="samples decoded at once (default: the run's)")
    suite.add_argument("--devices", type=int, metavar="N", help="that share the model and the samples (default: 1)")
    suite.add_argument("--against", type=Path, metavar="RESULT", help="a result, or its directory, to compare with")
    suite.add_argument(
        "--out", type=Path, metavar="DIR", help="for the files (default: RUN/suite/STEP, or ./suite/NAME)"
    )
    suite.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where hosts do not find each other")
    suite.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    suite.add_argument("--process-id", type=int, metavar="N", help="number of this one, from 0")


def _add_probe(commands) -> None:
    probe = commands.add_parser(
        "probe",
        help="where the gap between the policies comes from",
        description="Samples from the deployed policy once and scores the same tokens by one policy after another, "
        "from the trainer's to the deployed one. docs/probe.md tells how to read the result.",
    )
    probe.add_argument("source", type=Path, help="a run, one checkpoint in it (RUN/checkpoints/STEP), or an HF folder")
    probe.add_argument("--format", help="serving format of the deployed policy (default: the run's)")
    probe.add_argument("--kv-cache", help="what its keys and values are stored in (default: the run's)")
    probe.add_argument("--prompts", type=int, help="prompts, one response each (default: 128)")
    probe.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="for a Hugging Face folder: a prompt a line, JSON or plain"
    )
    probe.add_argument("--seed", type=int, default=0, help="of the samples")
    probe.add_argument("--stale", type=int, metavar="STEP", help="serve the weights of this checkpoint of the run")
    probe.add_argument("--out", type=Path, metavar="DIR", help="for the files (default: RUN/probe, or ./probe)")
    probe.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    probe.set_defaults(run=_probe)


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="Hugging Face checkpoints: import, export, inspect",
        description="Moves weights between Hugging Face folders (config.json and safetensors) and runs. "
        "Supported are Qwen3, Qwen3-MoE and Qwen2 (so also DeepSeek-R1-Distill-Qwen), not quantised.",
    )
    actions = convert.add_subparsers(title="actions", required=True, metavar="ACTION", parser_class=_Parser)
    dtypes = ("float32", "bf16", "fp16")

    importing = actions.add_parser(
        "import",
        help="verify a Hugging Face folder and write it again with checksums",
        description="Reads every weight of a Hugging Face folder, refuses what is damaged, incomplete or not finite, "
        "and writes the same weights with a checksum each, config.json in old and new style, and the tokenizer.",
    )
    importing.add_argument("folder", type=Path, metavar="HF_FOLDER", help="config.json and safetensors, of any dtype")
    importing.add_argument("out", type=Path, metavar="OUT", help="a folder to make; nothing is overwritten")
    importing.add_argument("--dtype", choices=dtypes, help="convert the weights (default: as stored)")
    importing.set_defaults(run=_convert_import)

    export = actions.add_parser(
        "export",
        help="write a run's policy as a Hugging Face folder",
        description="Writes the training policy of a checkpoint, and the run's tokenizer, as a folder that "
        "transformers (from 4.51) and vLLM load.",
    )
    export.add_argument("source", type=Path, metavar="RUN_OR_STEP", help="a run directory, or RUN/checkpoints/STEP")
    export.add_argument("out", type=Path, metavar="OUT", help="a folder to make; nothing is overwritten")
    export.add_argument("--dtype", choices=dtypes, help="of the weights (default: as trained)")
    export.add_argument("--ema", action="store_true", help="the moving average of the weights, not the last ones")
    export.set_defaults(run=_convert_export)

    inspect = actions.add_parser(
        "inspect",
        help="what a Hugging Face folder holds, without loading it",
        description="Prints architecture, parameters, dtypes, files and whether checksums are there; reads only "
        "config.json and the files' headers.",
    )
    inspect.add_argument("folder", type=Path, metavar="FOLDER", help="a Hugging Face folder")
    inspect.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    inspect.set_defaults(run=_convert_inspect)


def _train(arguments: list[str]) -> None:
    recipe = "quickstart"
    if arguments and not arguments[0].startswith("-") and not OVERRIDE.fullmatch(arguments[0]):
        recipe, *arguments = arguments
    config = _override(_load_recipe(recipe), recipe, arguments)
    with _computing(), _told(), _leaving("train"):
        from dcjax.loop.train import train

        drawn = train(config)
    if drawn is not None:
        print(f"plot:   {drawn[0]}\nreport: {drawn[1]}")


@contextlib.contextmanager
def _told():
    """Shows on standard error what the package logs, of the first process of several."""
    from dcjax.sharding.hosts import is_main

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("dcjax: %(message)s"))
    handler.addFilter(lambda record: is_main())
    logger = logging.getLogger("dcjax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # a library that gives the root a handler would tell everything again
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


@contextlib.contextmanager
def _leaving(command: str):
    """Ends a process of several that fails, which would wait for the others otherwise."""
    from dcjax.sharding.hosts import has_joined, leave

    try:
        yield
    except BaseException as error:
        if has_joined():
            leave(_tell(error, command))
        raise


def _load_recipe(recipe: str):
    """The Config of a recipe, given as a file or by the name of one in experiments/."""
    try:
        given = local_path(recipe)
    except ValueError as error:
        raise RunError(f"the recipe {error}") from None
    path = given if recipe.endswith(".py") else RECIPES / f"{recipe}.py"
    if not path.is_file():
        # other experiments, which are no recipes, are scripts of their own
        recipes = (file.stem for file in RECIPES.glob("*.py") if "def config(" in file.read_text())
        known = ", ".join(sorted(recipes)) or "none here"
        raise RunError(f"no recipe {path}; give a Python file, or the name of one in {RECIPES}/: {known}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by its name
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        config = module.config()
    except (Exception, SystemExit) as error:  # whatever the recipe's own code raises
        raise RunError(f"recipe {path}: {type(error).__name__}: {error}") from error
    from dcjax.recipe.config import Config

    if not isinstance(config, Config):
        raise RunError(
            f"recipe {path}: config() returned {type(config).__name__}; it must return a dcjax.recipe.config.Config"
        )
    return config


def _override(config, recipe: str, arguments: list[str]):
    """The recipe's Config with fields from the command line: `--section.field value` or `section.field=value`."""
    import tyro

    spelled = []
    for argument in arguments:
        match = OVERRIDE.fullmatch(argument.removeprefix("--"))
        is_value = bool(spelled) and spelled[-1].startswith("--") and not argument.startswith("--")
        spelled += [f"--{match[1]}", match[2]] if match and not is_value else [argument]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _path_fields():
            return tyro.cli(
                type(config),
                default=config,
                # a section that may be of several kinds is of the recipe's
                config=(tyro.conf.AvoidSubcommands,),
                args=spelled,
                use_underscores=True,
                prog=f"dcjax train {recipe}",
                description=f"{type(config).__doc__} {NO_CACHE_HELP}",
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise RunError(_one_line(errors.getvalue(), recipe)) from None


def _path_fields():
    """A context in which tyro hands fields of type Path on as they were given: of "" it would make a Path of "."."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str | Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda given: given[0],
            is_instance=lambda value: isinstance(value, str | Path),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def _one_line(message: str, recipe: str) -> str:
    """tyro's boxed error as one sentence: what is wrong, and the nearest field or the kind of value expected."""
    lines = [line.strip(" │|") for line in message.splitlines()]
    lines = [line for line in lines if line.strip("─-╭╮╰╯ ")]
    starts = ("Perhaps you meant", "Argument helptext", "For full helptext", "Are you sure", "Similar")
    hint = next((i for i, line in enumerate(lines) if line.startswith(starts)), len(lines))
    what = re.sub(r"^Error parsing (\S+: )?(?!--)", "", " ".join(lines[1:hint])).rstrip(".")
    fields = [line for line in lines[hint:] if line.startswith("--")]
    if fields:
        what += f"; {'perhaps you meant' if lines[hint].startswith('Perhaps') else 'expected'} {fields[0]}"
    return f"{what}; see dcjax train {recipe} --help"


def _evaluate(options: argparse.Namespace) -> None:
    if options.suite is not None:
        _evaluate_suite(options)
        return
    _refuse(options, SUITE_OPTIONS, "needs --suite")
    with _computing():
        from dcjax.tools.evaluate import evaluate_source

        results = evaluate_source(
            options.source, prompts=options.prompts, temperature=options.temperature, format=options.format
        )
    if options.json:
        print(json.dumps({"step": results.step, "policies": [dataclasses.asdict(row) for row in results.rows]}))
        return
    print(f"step {results.step}, temperature {results.temperature:g}")
    print(f"{'policy':<14}{'format':<10}{'correct':<12}{'accuracy':<10}95% interval")
    for row in results.rows:
        interval = f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        print(f"{row.policy:<14}{row.format:<10}{f'{row.correct}/{row.total}':<12}{row.accuracy:<10.3f}{interval}")


def _evaluate_suite(options: argparse.Namespace) -> None:
    _refuse(options, ("prompts",), "is of held-out prompts, which --suite replaces; --problems limits its benchmarks")
    with _computing():
        _run_suite(options)


def _run_suite(options: argparse.Namespace) -> None:
    from dcjax.sharding.hosts import DistributedConfig
    from dcjax.tools.suite.benchmarks import SuiteConfig
    from dcjax.tools.suite.result import read_result, to_json
    from dcjax.tools.suite.suite import evaluate_suite
    from dcjax.tools.suite.tables import to_markdown, write_result

    against = None if options.against is None else read_result(options.against)
    try:
        distributed = DistributedConfig(**_given(options, "coordinator", "num_processes", "process_id"))
    except ValueError as error:
        raise RunError(str(error)) from None
    names = ("suite", "temperature", "samples", "problems", "max_response_length", "template", "seed")
    with _leaving("evaluate"):
        found = evaluate_suite(
            options.source,
            SuiteConfig(**_given(options, *names)),
            data_dir=options.data_dir or Path("data"),
            distributed=distributed,
            **_given(options, "out", "devices", "format", "slots"),
        )
    if found is None:
        return
    result, directory = found
    files = write_result(result, directory, against)
    print(to_json(result) if options.json else to_markdown(result, against))
    if not options.json:
        print("\n".join(f"{kind + ':':<7}{path}" for kind, path in files.items()))


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name, value in _given(options, *names).items():
        raise RunError(f"--{name.replace('_', '-')} is {value}; it {why}")


def _data(options: argparse.Namespace) -> None:
    from dcjax.data.prepare import prepare_data

    try:
        report = prepare_data(
            options.data_dir,
            **_given(options, "names"),
            download=options.download,
        )
    except ValueError as error:
        raise RunError(str(error)) from None
    print(json.dumps(dataclasses.asdict(report)) if options.json else report)


def _probe(options: argparse.Namespace) -> None:
    with _computing():
        from dcjax.tools.probe.probe import probe
        from dcjax.tools.probe.source import load_source
        from dcjax.tools.probe.tables import to_json, to_text, write_probe

        source = load_source(
            options.source,
            format=options.format,
            kv_cache=options.kv_cache,
            prompts=options.prompts,
            prompts_file=options.prompts_file,
            stale_step=options.stale,
        )
        result = probe(source, seed=options.seed)
    data, picture = write_probe(result, options.out or source.out)
    print(to_json(result) if options.json else f"{to_text(result)}\njson: {data}\nplot: {picture}")


def _report(options: argparse.Namespace) -> None:
    from dcjax.reporting.run_report import write_report

    try:
        picture, page = write_report(options.run_dir)
    except ValueError as error:
        raise RunError(str(error)) from error
    print(f"plot:   {picture}\nreport: {page}")


@contextlib.contextmanager
def _tensors_shown():
    """A callback that shows, tensor by tensor, how far a conversion is."""
    from dcjax.reporting.progress import Progress

    with contextlib.ExitStack() as stack:
        bars = []

        def told(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(total, initial=0, description="tensor")))
            bars[0].update(done)

        yield told


def _convert_import(options: argparse.Namespace) -> None:
    from dcjax.tools.convert import import_folder

    with _tensors_shown() as told:
        import_folder(options.folder, options.out, dtype=options.dtype, told=told)
    print(f"imported: {options.out}")


def _convert_export(options: argparse.Namespace) -> None:
    with _computing(), _tensors_shown() as told:
        from dcjax.tools.convert import export_run

        step = export_run(options.source, options.out, dtype=options.dtype, averaged=options.ema, told=told)
    print(f"exported: {options.out} (step {step})")


def _convert_inspect(options: argparse.Namespace) -> None:
    from dcjax.tools.convert import inspect_folder

    found = inspect_folder(options.folder)
    if options.json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    config = found.config
    experts = f", {config.num_experts} experts of which a token takes {config.num_experts_per_tok}"
    rows = {
        "architecture": config.family + (experts if config.num_experts else ""),
        "layers": f"{config.num_layers} of width {config.hidden_size}",
        "heads": f"{config.num_heads} of width {config.head_dim}, {config.num_kv_heads} for keys and values",
        "vocabulary": f"{config.vocab_size}, {'tied' if config.tie_embeddings else 'untied'} head",
        "parameters": f"{found.parameters:,}, active {found.active_parameters:,}",
        "dtypes": ", ".join(f"{name} ({count} tensors)" for name, count in found.dtypes.items()),
        "files": f"{found.files}, {found.bytes:,} bytes",
        "checksums": "yes" if found.checksums else "no",
    }
    for name, value in rows.items():
        print(f"{name:<14}{value}")
