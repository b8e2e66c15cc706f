"""A first signal asks for a stop, a second Ctrl-C ends at once: pytest tests/distributed/test_signals.py"""

import os
import signal

import pytest

from ochat.distributed.signals import SIGNALS, Interrupted, StopSignal


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_and_a_second_ctrl_c_ends_at_once(number):
    before = signal.getsignal(number)
    with StopSignal(world=1) as stop:
        assert not stop.requested_anywhere()
        os.kill(os.getpid(), number)
        assert stop.requested_anywhere()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="after step 3") as stopped:
            stop.stop(3)
    assert stopped.value.exit_code == 128 + number and signal.getsignal(number) == before
