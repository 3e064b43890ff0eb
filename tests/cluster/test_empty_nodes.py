"""Tasks that reserve no CPUs stay away from a head that only coordinates."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(200)]

# In a separate process, because the tests of this one share a cluster.
SCRIPT = """
import json

import pyarrow as pa
import ray
import ray.data
from ray.cluster_utils import Cluster

from raydet.cluster.ray_data import TaskSource
from raydet.cluster.ray_internals import away_from_empty_nodes

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
ray.init(address=cluster.address, log_to_driver=False)
head = ray.get_runtime_context().get_node_id()


@ray.remote(num_cpus=0)
def node():
    return ray.get_runtime_context().get_node_id()


away = node.options(**away_from_empty_nodes())
waiting = [away.remote() for _ in range(3)]
early, _ = ray.wait(waiting, timeout=2)
cluster.add_node(num_cpus=1)
later = ray.get([*waiting, *(away.remote() for _ in range(5))], timeout=100)


def read():
    yield pa.table({"node": [ray.get_runtime_context().get_node_id()]})


readers = ray.data.read_datasource(
    TaskSource("Nodes", [read] * 6), num_cpus=0, override_num_blocks=6, **away_from_empty_nodes()
)
later += [row["node"] for row in readers.take_all()]
print(json.dumps({"early": len(early), "on_head": later.count(head), "total": len(later)}))
ray.shutdown()
cluster.shutdown()
"""


def test_tasks_without_cpus_run_where_cpus_are() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=180, check=True)
    assert json.loads(result.stdout.strip().splitlines()[-1]) == {"early": 0, "on_head": 0, "total": 14}
