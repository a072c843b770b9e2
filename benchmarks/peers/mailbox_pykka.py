"""Messages told to one actor of Pykka's, and asks answered by it, as rates. ``mailbox_pykka.py TELLS ASKS``."""

import sys
import time

import pykka


class Counter(pykka.ThreadingActor):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def on_receive(self, message):
        self.seen += 1
        return self.seen


def main(tells, asks):
    actor = Counter.start()
    began = time.perf_counter()
    for number in range(tells):
        actor.tell(number)
    assert actor.ask(None) == tells + 1
    told = tells / (time.perf_counter() - began)
    began = time.perf_counter()
    for number in range(asks):
        actor.ask(number)
    print(told, asks / (time.perf_counter() - began))
    actor.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
