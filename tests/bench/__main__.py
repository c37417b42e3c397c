"""`python -m tests.bench [NAME...]`: measures what fleetctl costs, and exits with 1 where a target is missed."""

import sys

from tests.bench.bench_daemon import main

sys.exit(main(sys.argv[1:]))
