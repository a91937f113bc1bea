"""Stands in for Hugging Face's package `spaces`, which is there on every Space with Gradio.

On ZeroGPU a decorated function runs in a forked process; on other hardware it stays as it is. As there, the requested time must
be left (the file LDVC_SPACES_QUOTA holds the seconds), errors are `gr.Error`, arguments and results travel as multiprocessing
hands things over, and each call runs in a thread of its own. The process ends after the call: nothing that the function kept is
there at the next one, which ZeroGPU does not promise either.
"""

import json
import multiprocessing
import os
import sys
import threading
from multiprocessing.queues import SimpleQueue
from pathlib import Path

RECORD = os.environ["LDVC_SPACES_RECORD"]
QUOTA = os.environ["LDVC_SPACES_QUOTA"]
FORK = multiprocessing.get_context("fork")


def note(**facts: object) -> None:
    with open(RECORD, "a") as record:
        record.write(json.dumps(facts) + "\n")


note(event="imported", torch_was_there="torch" in sys.modules)


def GPU(task=None, *, duration=None, size=None):
    """The decorator, with and without arguments."""
    if task is None:
        return lambda function: GPU(function, duration=duration, size=size)

    if os.environ.get("SPACES_ZERO_GPU") != "true":
        return task

    def lent(*arguments, **options):
        import gradio as gr

        requested = duration(*arguments, **options) if callable(duration) else duration or 60
        left = float(Path(QUOTA).read_text())
        if requested > left:
            times = f"{requested}s requested vs. {left:.0f}s left"
            message = f"You have exceeded your ZeroGPU quota ({times}). Try again in 5:00:00. "
            raise gr.Error(message, title="ZeroGPU quota exceeded", print_exception=False)
        answers = SimpleQueue(ctx=FORK)
        questions = SimpleQueue(ctx=FORK)

        def work() -> None:
            given, named = questions.get()
            try:
                answers.put((True, task(*given, **named)))
            except Exception as error:
                answers.put((False, type(error).__name__))

        def in_thread() -> None:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

        process = FORK.Process(target=in_thread, daemon=True)
        process.start()
        questions.put((arguments, options))
        fine, answer = answers.get()
        process.join()
        note(event="lent", duration=requested, process=process.pid, main=os.getpid())
        if not fine:
            raise gr.Error(answer, title="ZeroGPU worker error", print_exception=False)
        return answer

    return lent


def gradio_auto_wrap(function):
    """Gradio hands every event's function over; without SPACES_GRADIO_AUTO_WRAP the package gives it back."""
    return function
