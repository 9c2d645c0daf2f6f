"""Run train.py in several processes of this host and start it again when one dies.

    python launch.py --processes=4 --restarts=3 -- --gin_file=configs/run/quickstart.gin --output=runs/quickstart

One process a host (the default) is what TPU hosts need; its restart then brings a host back after its coordinator or a
peer was lost.
"""

import sys

from lcjax.train.supervise import main

if __name__ == "__main__":
    sys.exit(main())
