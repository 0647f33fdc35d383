"""Opens the store at argv[1] and adds argv[3] batches of usage from number argv[2] on; prints each when it is stored."""

from __future__ import annotations

import sys

from llm_router.accounts.store import Store
from llm_router.accounts.usage import UsageRow

BATCH_ROWS = 50


def batch(number: int) -> list[UsageRow]:
    """The rows of a batch: always the same for the same number."""
    return [
        UsageRow(id=f"{number}-{index}", time=1.7e9 + number, request_id="r", key_id="k", model="m", input_tokens=1)
        for index in range(BATCH_ROWS)
    ]


if __name__ == "__main__":
    store = Store.open(sys.argv[1])
    print("open", flush=True)
    first, count = int(sys.argv[2]), int(sys.argv[3])
    for number in range(first, first + count):
        store.add_usage(batch(number))
        print(number, flush=True)
    store.close()
