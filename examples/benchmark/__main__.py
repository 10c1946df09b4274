"""Training steps and generation, each workload in one interleaved run with other methods.

pip install --requirement examples/benchmark/requirements.txt
pip install --no-deps pyreft==0.1.0
python examples/benchmark --help
"""

import sys

from run import benchmark

from reftnoise.cli.main import run

if __name__ == "__main__":
    sys.exit(run(benchmark, sys.argv[1:], prog="python examples/benchmark"))
