"""Run by tests: ends with code 3, while a daemon thread of it is inside torch."""

import atexit
import sys
import threading
import time

import torch

from pipeline.supervision.process_exit import end


def work() -> None:
    one = torch.ones(300, 300, requires_grad=True)
    while True:
        one.mm(one).sum().backward()


if __name__ == "__main__":
    atexit.register(print, "registered")
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.5)
    sys.stdout.write("written ")
    end(3)
