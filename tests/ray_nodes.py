"""Two nodes of a Ray cluster on this machine, of one core each, that serve until the input ends.

Ray's own Python runs this, with a configuration of `serve run`. Each line of the input names a
picture, on which it prints what the application's handle says.
"""

import json
import sys
from pathlib import Path

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.scripts import cli

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
ray.init(cluster.address, namespace="serve")
cli(["run", "--non-blocking", sys.argv[1]], standalone_mode=False)
print(f"host {ray.util.get_node_ip_address()}", flush=True)
for line in sys.stdin:
    handle = serve.get_app_handle("rampart")
    verdict = handle.predict.remote(Path(line.strip()).read_bytes()).result()
    print(f"verdict {json.dumps(verdict)}", flush=True)
ray.shutdown()
cluster.shutdown()
