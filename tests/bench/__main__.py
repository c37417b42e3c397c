"""`python -m tests.bench [NAME...]`: measures what fleetctl costs, and exits with 1 where a target is missed."""

import sys

from tests.bench import bench_autoscale, bench_checkpoints, bench_daemon, bench_notify, bench_warm

bench_daemon.BENCHES.update(bench_warm.BENCHMARKS)
bench_daemon.BENCHES.update(bench_autoscale.BENCHMARKS)
bench_daemon.BENCHES.update(bench_notify.BENCHMARKS)
bench_daemon.BENCHES.update(bench_checkpoints.BENCHMARKS)
sys.exit(bench_daemon.main(sys.argv[1:]))
