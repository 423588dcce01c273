"""Two nodes of a Ray cluster on this machine, of one core each, that serve until the input ends.

Ray's own Python runs this, with a configuration of `serve run`.
"""

import sys

import ray
from ray.cluster_utils import Cluster
from ray.serve.scripts import cli

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(cluster.address, namespace="serve")
cli(["run", "--non-blocking", sys.argv[1]], standalone_mode=False)
print(f"host {ray.util.get_node_ip_address()}", flush=True)
sys.stdin.read()
ray.shutdown()
cluster.shutdown()
