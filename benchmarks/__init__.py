"""What a request costs, measured against doing without us, against nginx and against other gateways.

`make bench` runs `python -m benchmarks.gateway`, `make bench-peers` the same with `--peers`. README.md beside this
file says how to read the outcome. Not for: correctness (tests/) or capacity planning (these are one-core figures).
"""
