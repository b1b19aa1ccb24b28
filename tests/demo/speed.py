# SPDX-License-Identifier: Apache-2.0
"""How long the page takes to start and to answer: ``python tests/demo/speed.py`` (on a machine that does nothing else).

Start: from the command to the first page that is served, less what loading the model takes in a process of its own (both
import torch). Answer: from the click to both answers on the page, in Chromium.
"""

import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

import browser as b

from vlmcompress.demo.models import DEFAULT, SAMPLES

STARTS, ANSWERS = 3, 10
LOADING = "import sys; from vlmcompress.eval.loading import load; load(sys.argv[1])"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def loading():
    """Seconds that a process takes to load the model and to do nothing else."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOADING, str(DEFAULT)], check=True, capture_output=True)
    return time.perf_counter() - start


def start():
    """The page's process, its address, and the seconds until it was served."""
    port, begin = free_port(), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vlmcompress.cli", "demo", "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return process, address, time.perf_counter() - begin
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                raise RuntimeError(f"The page ended with {process.returncode}.") from None
            time.sleep(0.05)


def answers(address):
    """Seconds from a click to both answers, one for each of ``ANSWERS`` clicks behind a first one that warms up."""
    times = []
    with b.chromium() as chromium:
        page = b.visit(chromium, address)
        b.ask(page, SAMPLES / "scene-1.png", "what color is the ring", 144)
        for _ in range(ANSWERS):
            page.evaluate("document.querySelectorAll('.vc-answer').forEach(e => e.dataset.state = 'old')")
            begin = time.perf_counter()
            page.click("#vc-ask")
            page.wait_for_selector("#vc-before .vc-answer[data-state=done]")
            page.wait_for_selector("#vc-after .vc-answer[data-state=done]")
            times.append(time.perf_counter() - begin)
            page.wait_for_selector("#vc-costs .vc-metric")
            page.wait_for_selector("#vc-json:not([disabled])")
    return times


def main():
    beyond, found = [], []
    for _ in range(STARTS):
        alone = loading()
        process, address, served = start()
        beyond.append(served - alone)
        print(f"served after {served:.1f} s, loading the model alone {alone:.1f} s", flush=True)
        try:
            if not found:
                found = answers(address)
        finally:
            process.terminate()
            process.wait()
    print(f"start beyond loading: median {statistics.median(beyond):.1f} s of {STARTS} (at most 10)")
    print(f"both answers: median {statistics.median(found):.2f} s, slowest {max(found):.2f} s of {ANSWERS} (at most 2)")


if __name__ == "__main__":
    main()
