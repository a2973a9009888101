"""The second rank crashes; the first waits for it."""

import time

from mtsql.run.launch import make_accelerator, start_missing_ranks

if __name__ == "__main__":
    start_missing_ranks()
    accelerator = make_accelerator("no")
    if accelerator.process_index == 1:
        raise RuntimeError("the reward of this rank is broken")
    accelerator.wait_for_everyone()
    time.sleep(3000)
