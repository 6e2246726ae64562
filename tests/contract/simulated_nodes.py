"""A Ray cluster of several simulated nodes on this machine: obeys `add` and `remove` on standard input.

    python -m tests.contract.simulated_nodes

Prints the cluster's address, then one line for each command that was carried out. A node is a raylet with one CPU; the
first, which stays, has none. Ends when its input does.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    try:
        print(cluster.address, flush=True)
        for command in sys.stdin:
            if command.strip() == "add":
                nodes.append(cluster.add_node(**NODE))
            else:
                cluster.remove_node(nodes.pop(), allow_graceful=False)  # as a machine that loses its power
            print(f"{len(nodes)} nodes", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
