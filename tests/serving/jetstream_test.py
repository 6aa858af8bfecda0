"""What is wrong in JetStream 0.2.2, and that it is mended: a mend that is no longer needed fails here."""

import logging
import queue
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from jetstream.core.proto import jetstream_pb2
from jetstream.engine import token_utils, tokenizer_api
from launching import fake_devices

from dcjax.serving.server.grpc.driver import orchestrator

pytestmark = pytest.mark.heavy

SERVE = """
    import asyncio, os
    {imports}
    from jetstream.core.proto import jetstream_pb2
    from jetstream.engine.mock_engine import TestEngine

    async def ask():
        engine = TestEngine(batch_size=2, cache_length=64, weight=2.0)
        params = engine.load_params()
        driver = orchestrator.Driver(
            prefill_engines=[engine], generate_engines=[engine], prefill_params=[params], generate_params=[params]
        )
        request = jetstream_pb2.DecodeRequest
        asked = request(text_content=request.TextContent(text="AB"), max_tokens=3)
        async for part in orchestrator.LLMOrchestrator(driver=driver).Decode(asked):
            # whose own engine takes seconds for each token
            print(part.stream_content.samples[0].text, flush=True)
            os._exit(0)

    asyncio.run(ask())
"""


def python(program, **names):
    command = [sys.executable, "-c", textwrap.dedent(program).format(**names)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=fake_devices(1))


@pytest.mark.slow
def test_the_driver_as_it_is_kills_its_process_at_the_first_request_and_the_mended_one_serves():
    as_it_is = python(SERVE, imports="from jetstream.core import orchestrator")
    assert as_it_is.returncode == -9
    assert "tree_map" in as_it_is.stderr
    # the mends of the module, with JetStream's own engine, whose prefixes are plain arrays
    mended = (
        "from dcjax.serving import jetstream",
        "orchestrator = jetstream.import_orchestrator()",
        "orchestrator.delete_pytree = lambda prefix: None",
    )
    served = python(SERVE, imports="; ".join(mended))
    assert served.returncode == 0, served.stderr
    assert served.stdout.split()


@pytest.mark.slow
def test_importing_it_sets_up_everybodys_logging_and_the_mended_import_does_not():
    told = "import logging; root = logging.getLogger(); print(root.level, len(root.handlers))"
    as_it_is = python(f"from jetstream.core import orchestrator; {told}")
    assert as_it_is.stdout.split()[-2:] == [str(logging.DEBUG), "1"]
    mended = python(f"from dcjax.serving.jetstream import import_orchestrator; import_orchestrator(); {told}")
    assert mended.stdout.split()[-2:] == [str(logging.WARNING), "0"]
    assert orchestrator.logging.name == "jetstream"


def test_params_are_kept_from_a_threads_start():
    # so that replacing them has no effect, and `Weights` are given in their place
    names = orchestrator.Driver._generate_thread.__code__.co_varnames
    assert "generate_params" in names[: names.index("slot")]


class Letters(tokenizer_api.Tokenizer):
    pad_id, eos_id, bos_id = 0, 1, 2

    def encode(self, s, **kwargs):
        raise NotImplementedError

    def decode(self, token_ids, **kwargs):
        return "".join(map(chr, token_ids))


def test_its_detokenizer_drops_the_end_token():
    from dcjax.serving.engine import SampledTokens

    sampled = SampledTokens(
        data=np.array([[65, 1, 1, 1, 2]]), tokens_idx=(0, 2), valid_idx=(2, 4), length_idx=(4, 5), samples_per_slot=1
    )
    (sample,), complete = token_utils.process_result_tokens(
        tokenizer=Letters(), slot=0, slot_max_length=10, result_tokens=sampled, complete=np.zeros(1, bool)
    )
    assert sample.token_ids == [65] and complete.all()


def test_it_cuts_long_prompts_at_their_beginning_and_tells_the_length_from_before():
    padded, length = token_utils.pad_tokens(
        np.arange(40), bos_id=2, pad_id=0, is_bos=False, max_prefill_length=16, jax_padding=False
    )
    assert (padded.tolist(), length) == (list(range(24, 40)), 40)


def test_its_servicer_takes_text_that_looks_like_a_byte_for_one():
    assert token_utils.text_tokens_to_str(["<0x41>"]) == "A"


def test_its_queue_has_no_limit():
    driver = object.__new__(orchestrator.Driver)
    driver._prefill_backlog = queue.Queue()
    for _ in range(10_000):
        orchestrator.Driver.place_request_on_prefill_queue(driver, None)


@pytest.mark.slow
def test_a_slot_that_comes_free_between_its_look_and_its_assertion_kills_it():
    program = """
    import queue, threading
    {imports}
    from jetstream.engine.mock_engine import TestEngine

    class Raced(queue.Queue):
        # the detokenize thread hands the only slot back right after the generate thread has found none
        def get(self, block=True, timeout=None):
            try:
                return super().get(block, timeout)
            except queue.Empty:
                self.put(0)
                raise

    driver = object.__new__(orchestrator.Driver)
    engine = TestEngine(batch_size=1, cache_length=64, weight=2.0)
    driver._generate_engines, driver._generate_params = [engine], [engine.load_params()]
    driver._generate_slots, driver._prefill_backlog = [Raced()], queue.Queue()
    driver._generate_backlogs, driver._detokenize_backlogs = {{0: queue.Queue()}}, [queue.Queue()]
    driver._transfer_backlogs, driver.live = [queue.Queue()], True
    driver._generate_thread(0)
    """
    ended = python(program, imports="from jetstream.core import orchestrator")
    assert ended.returncode == 1
    assert "we must have some requests inserted into the slots" in ended.stderr


def test_a_request_without_content_is_a_fault_of_its_own():
    servicer = orchestrator.LLMOrchestrator(driver=None)
    with pytest.raises(TypeError):
        servicer._get_prefill_content(jetstream_pb2.DecodeRequest())
