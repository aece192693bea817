"""Two ranks as torchrun starts them, by forks of the test's process, which has paid for its imports."""

import multiprocessing
import os
import socket

from train.__main__ import main


def on_two_ranks(work, codes=(0, 0)):
    """Call `work(rank)` in two processes that can find each other; hold their exit codes against `codes`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(rank):
        given = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in given.items()})
        main(lambda: work(rank))

    processes = [multiprocessing.get_context("fork").Process(target=begin, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    found = tuple(process.exitcode for process in processes)
    for process in processes:
        process.kill()
    assert found == codes
