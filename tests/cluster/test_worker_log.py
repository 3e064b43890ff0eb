"""The log lines of workers name job, node, process and rank."""

import logging
from pathlib import Path

import ray

from raydet.cluster.worker_log import log_from_here


def test_a_line_says_whose_it_is(ray_cluster: None, tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    def work() -> tuple[str, str, str]:
        for rank in (0, None):
            log_from_here(f"{tmp_path}/log", rank=rank)
            logging.getLogger("raydet.somewhere").info("ready: %d%%", 100)
        logging.getLogger("elsewhere").warning("is not of raydet")
        (tmp_path / "file").write_text("a file is in the way, which is no reason to end")
        log_from_here(f"{tmp_path}/file")
        logging.getLogger("raydet").warning("nobody reads this")
        context = ray.get_runtime_context()
        return context.get_job_id(), context.get_node_id(), ray.util.get_node_ip_address()

    job_id, node_id, address = ray.get(work.remote())
    lines = (tmp_path / "log" / f"node-{address}.log").read_text().splitlines()
    assert len(lines) == 2, "each in the file once"
    for line in lines:
        assert f" INFO raydet.somewhere job={job_id} node={address}/{node_id[:8]} pid=" in line
    assert lines[0].endswith(" rank=0: ready: 100%")
    assert lines[1].endswith(": ready: 100%") and "rank=" not in lines[1]
