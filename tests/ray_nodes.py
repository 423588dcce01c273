"""Two nodes of a Ray cluster on this machine, of one core each, that serve until the input ends.

Ray's own Python runs this, with a configuration of `serve run`. A line of the input names a
picture, on which it prints what the application's handle says, or a configuration that comes after
the one before; after `again` Ray Serve is stopped first, since it reads some options but once.
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


def run(config: str) -> None:
    cli(["run", "--non-blocking", config], standalone_mode=False)


run(sys.argv[1])
print(f"host {ray.util.get_node_ip_address()}", flush=True)
for line in sys.stdin:
    *again, name = line.split()
    if again:
        serve.shutdown()
    if name.endswith(".yaml"):
        run(name)
    else:
        handle = serve.get_app_handle("rampart")
        verdict = handle.predict.remote(Path(name).read_bytes()).result()
        print(f"verdict {json.dumps(verdict)}", flush=True)
ray.shutdown()
cluster.shutdown()
