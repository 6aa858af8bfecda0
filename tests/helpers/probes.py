"""A result of `dcjax probe` that is made up."""

from dcjax.tools.probe.gaps import FIGURES, Stage
from dcjax.tools.probe.probe import Probe


def gap(mean):
    return dict.fromkeys(FIGURES, mean) | {"prob_diff_max": 10 * mean}


RESULT = Probe(
    source="run $x^",
    step=40,
    format="int8",
    kv_cache="int8",
    responses=3,
    max_response_length=20,
    tokens=17,
    stages=[
        Stage("decode_path", "float32", gap(1e-7), gap(1e-7)),
        Stage("kv_cache", "int8", gap(0.0123), gap(0.0456)),
        Stage("as_sampled", "", gap(0.0), gap(0.0456)),
    ],
    total=gap(0.0456),
    recommended_budget=0.0684,
    formats={
        "float32": gap(1e-7) | {"bytes": 4096, "float32_bytes": 4096, "quantized": []},
        "int8": gap(0.0456) | {"bytes": 1024, "float32_bytes": 4096, "quantized": ["q_proj"]},
        "int4": {"not_served": "groups of 32 do not fit"},
    },
    by_position=[{"from": 0, "to": 1, "tokens": 3, "prob_diff_mean": 0.1, "prob_diff_max": 0.2}],
    by_probability=[{"from": 0.9, "to": 0.99, "tokens": 17, "prob_diff_mean": 0.03, "prob_diff_max": 0.2}],
    by_layer=[{"layer": 0, "relative_error": 0.011}, {"layer": 1, "relative_error": 0.022}],
    worst_tokens=[
        {
            "response": 1,
            "position": 2,
            "before": "1+2=",
            "token": r"\x1b[",
            "behind": "3",
            "trained": 0.75,
            "sampled": 0.25,
            "prob_diff": 0.5,
        }
    ],
    sharding={"not_measured": "one device"},
    sampling={"temperature": 0.7, "top_k": 0, "top_p": 1.0} | gap(0.31),
    chunks={
        "sequences": {"own": 3, "other": 1} | gap(3e-6),
        "head": {"own": 20, "other": 2} | gap(4e-6),
    },
    routing=None,
)
