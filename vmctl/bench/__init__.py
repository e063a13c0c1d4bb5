"""Measuring what virtualization costs, from inside guests: workloads, their results, statistics, comparison."""
