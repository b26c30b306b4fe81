"""Throughput against batch size as a picture."""

from pathlib import Path

from jaxserve.bench.offline import Result


def plot(results: list[Result], title: str, path: str | Path) -> None:
    """Write a picture of output tokens per second and time per output token; the suffix chooses the format.

    Needs matplotlib, which is imported here because nothing else does.
    """
    from matplotlib.figure import Figure

    sizes = [result.batch_size for result in results]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    speeds = [result.output_tokens_per_second for result in results]
    axes.plot(sizes, speeds, marker="o", color="tab:blue", label="output tokens/s")
    for size, speed in zip(sizes, speeds, strict=True):
        axes.annotate(f"{speed:.0f}", (size, speed), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("output tokens/s", color="tab:blue")
    axes.set_ylim(bottom=0, top=1.15 * max(speeds))
    axes.grid(alpha=0.3)
    other = axes.twinx()
    times = [1e3 * result.time_per_output_token_median for result in results]
    other.plot(sizes, times, marker="s", linestyle="--", color="tab:orange", label="ms per output token")
    other.set_ylabel("ms per output token (median)", color="tab:orange")
    other.set_ylim(bottom=0)
    axes.set_title(title)
    figure.savefig(path, dpi=150)
