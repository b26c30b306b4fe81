"""Offline data parallelism: each rank has an engine of its own and generates for its part of the prompts.

    jaxserve launch --mesh examples/mesh/two_cpu_ranks.yaml -- examples/data_parallel.py [MODEL]
    torchrun --nproc-per-node 2 examples/data_parallel.py [MODEL]
    srun --ntasks 8 --gpus-per-task 1 python examples/data_parallel.py [MODEL]

It also runs alone, as the only rank; or start it by hand with JAXSERVE_DP_RANK, JAXSERVE_DP_SIZE,
JAXSERVE_DP_MASTER_IP and JAXSERVE_DP_MASTER_PORT set (vLLM's names VLLM_DP_... work too).
"""

import sys

from jaxserve import LLM, SamplingParams
from jaxserve.distributed import current_rank, engine_options, gather, partition

PROMPTS = [f"The number after {number} is" for number in range(7)]


def main(model: str | None = None) -> None:
    ranks = current_rank()
    mine = partition(PROMPTS)  # the first parts are one longer; a part may be empty
    llm = LLM(model, **({"max_model_len": 256, "max_num_seqs": 4} | engine_options()))
    outputs = llm.generate(mine, SamplingParams(temperature=0, max_tokens=8)) if mine else []
    print(f"rank {ranks.rank} of {ranks.size}: {len(outputs)} prompts")
    everything = gather(outputs)  # on every rank, in the order of PROMPTS
    if ranks.rank == 0:
        for output in everything:
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
