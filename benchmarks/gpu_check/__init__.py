"""Everything about vLLM on a GPU that tests on a CPU cannot show: `python -m benchmarks.gpu_check`.

Parts are measured one after another and each is an entry of a JSON file; see `parts`. Every model
is loaded in a process of its own, so that its memory is free again and its death hides nothing.
"""
