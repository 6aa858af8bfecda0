"""`dcjax serve`: the deployed policy over gRPC, behind JetStream's orchestrator, or over HTTP."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dcjax.cli.arguments import add_recipe_code_option, given_options
from dcjax.cli.session import jax_session
from dcjax.errors import RunError

SERVING_OPTIONS = ("format", "kv_cache", "slots", "steps_per_call")
LENGTH_OPTIONS = ("max_prompt_length", "max_response_length")
SERVER_OPTIONS = ("host", "port", "metrics_port", "waiting", "grace", "reload_every", "request_seconds", "log")
HTTP_OPTIONS = ("token_file", "request_seconds", "log", "train_logprobs")


def add_parser(commands) -> None:
    """Adds the command's options."""
    parser = commands.add_parser(
        "serve",
        help="serve a policy over gRPC or HTTP as it was trained to be served",
        description="Loads a policy, compiles, and serves it until SIGTERM or Ctrl-C, which let running requests end. "
        "Newer checkpoints of a run are served as they are saved. docs/server.md explains what requests may ask for.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run directory, one of its checkpoints (RUN/checkpoints/STEP), or a Hugging Face folder",
    )
    parser.add_argument(
        "--protocol",
        choices=("grpc", "http"),
        default="grpc",
        help="grpc is JetStream's service, http OpenAI's completions and chat (default: grpc)",
    )
    parser.add_argument("--host", help="address to listen at (default: 127.0.0.1, which only this machine reaches)")
    parser.add_argument("--port", type=int, help="port to listen at; 0 takes any that is free (default: 9000)")
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="port of Prometheus' metrics (default: none)")
    parser.add_argument("--slots", type=int, metavar="N", help="requests decoded at once (default: the run's, or 32)")
    parser.add_argument(
        "--waiting", type=int, metavar="N", help="requests that may wait for a slot; more are refused (default: 512)"
    )
    parser.add_argument(
        "--max-prompt-length", type=int, metavar="TOKENS", help="longest prompt (default: as trained, or 1024)"
    )
    parser.add_argument(
        "--max-response-length", type=int, metavar="TOKENS", help="longest response (default: as trained, or 1024)"
    )
    parser.add_argument(
        "--steps-per-call",
        type=int,
        metavar="K",
        help="tokens decoded in each slot per turn (default: the run's, or 8)",
    )
    parser.add_argument("--format", help="serving format (default: as trained, or int8 for a Hugging Face folder)")
    parser.add_argument("--kv-cache", help="storage format of the KV cache (default: as trained)")
    parser.add_argument(
        "--other-format", action="store_true", help="allow a format other than the one that the policy was trained for"
    )
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="devices that share the model (default: 1)")
    parser.add_argument(
        "--reload-every", type=float, metavar="SECONDS", help="how often to look for a newer checkpoint (default: 2)"
    )
    parser.add_argument(
        "--grace", type=float, metavar="SECONDS", help="time that running requests have to end at a stop (default: 60)"
    )
    http = parser.add_argument_group("over HTTP")
    http.add_argument(
        "--token-file", type=Path, metavar="FILE", help="what clients must send as bearer token (default: nothing)"
    )
    http.add_argument("--request-seconds", type=float, metavar="SECONDS", help="time of a request (default: 600)")
    http.add_argument(
        "--log",
        choices=("none", "requests", "prompts"),
        help="print nothing, a line of JSON for each request, or that with its prompt (default: requests)",
    )
    http.add_argument(
        "--train-logprobs",
        action="store_true",
        default=None,
        help="keep the training policy too, to show where the served one differs from it",
    )
    add_recipe_code_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serves the source until the process is told to stop."""
    with jax_session():
        from dcjax.serving.server.served import ServerConfig
        from dcjax.tools.serve import load_served, serve

        server = ServerConfig(**given_options(options, *SERVER_OPTIONS), token=_token(options))
        served = load_served(
            options.source,
            serving={name: getattr(options, name) for name in SERVING_OPTIONS},
            lengths={name: getattr(options, name) for name in LENGTH_OPTIONS},
            other_format=options.other_format,
            devices=options.devices,
            recipe_code=options.recipe_code,
            protocol=options.protocol,
            train_logprobs=bool(options.train_logprobs),
        )
        serve(
            served, server, options.protocol, told=lambda line: print(f"serving: {line}", file=sys.stderr, flush=True)
        )


def _token(options: argparse.Namespace) -> str | None:
    """What is in the file of the bearer token.

    Raises:
      RunError: it is empty, or an option is of the other protocol.
    """
    if options.protocol == "http" and options.metrics_port is not None:
        raise RunError("--metrics-port is of gRPC; over HTTP, metrics are at /metrics of --port")
    for name in HTTP_OPTIONS:
        if options.protocol == "grpc" and getattr(options, name) is not None:
            raise RunError(f"--{name.replace('_', '-')} is of HTTP; give --protocol http")
    if options.token_file is None:
        return None
    if not (token := options.token_file.read_text("utf-8").strip()):
        raise RunError(f"{options.token_file} is empty; it must hold the token")
    return token
