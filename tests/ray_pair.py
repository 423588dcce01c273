"""Two nodes of a Ray cluster on this machine, of one core each; a line of the input kills one."""

import sys

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}

cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
other = cluster.add_node(**NODE)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
    print("killed", flush=True)
cluster.shutdown()
