"""Whether two checkouts compute the same: fixed calls of public names, run by each in turn, compared number by number.

    python -m benchmarks.same_results BEFORE_CHECKOUT AFTER_CHECKOUT

Outputs, first gradients, initial parameters and errors must be the same, bit for bit; second derivatives, which only
float64 calls have, within 4 roundings of the largest number of their array. Each call runs on 1 and on 2 threads. A
call draws its numbers from its own name, so that a new one changes no other.
"""
