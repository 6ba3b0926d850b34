"""What the benchmarks that compare contenders have in common: rounds in ever another order, and ratios of neighbours in time"""
import random
import statistics
import time


def interleaved(calls: dict, rounds: int, look=lambda name, result: None) -> tuple:
    "Call every contender (a function of the round) once a round; (name → seconds of each round, name → CPU seconds, name → last result)"
    seconds, cpu, last, order = {k: [] for k in calls}, {k: [] for k in calls}, {}, list(calls)
    for r in range(rounds):
        random.Random(r).shuffle(order)
        for k in order:
            start, used = time.perf_counter(), time.process_time()
            last[k] = calls[k](r)
            seconds[k].append(time.perf_counter() - start)
            cpu[k].append(time.process_time() - used)
            look(k, last[k])
    return seconds, cpu, last


def ratio(times: dict, base: str, name: str) -> float:
    "How many times faster than `base`: a ratio per round, then the median, since neighbours in time share the machine's mood"
    return statistics.median(b / a for a, b in zip(times[name], times[base]))
