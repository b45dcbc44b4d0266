"""A web service whose requests are calculated in the cluster, while its event loop goes on serving others.

    python -m pip install aiohttp
    python examples/web_service.py [PORT]
    curl 'http://127.0.0.1:8080/factors?n=600851475143'
"""
import asyncio
import sys

from aiohttp import web

import clupy


@clupy.parallel(timeout="10s")
def factors(n):
    found, d = [], 2
    while d * d <= n:
        while n % d == 0:
            found.append(d)
            n //= d
        d += 1
    return found + [n] * (n > 1)


async def answer(request):
    """Awaited, a call gives its result or raises; who hangs up cancels it, and its worker is free again."""
    try:
        n = int(request.query["n"])
    except (KeyError, ValueError):
        raise web.HTTPBadRequest(text="ask for /factors?n=NUMBER\n")
    try:
        return web.json_response({"n": n, "factors": await factors(n)})
    except clupy.CallTimeout:
        raise web.HTTPGatewayTimeout(text=f"{n} took longer than 10 s\n")


async def main(port):
    print(f"calls run on {await asyncio.to_thread(clupy.connect)}", flush=True)     # it waits for the cluster
    app = web.Application()
    app.router.add_get("/factors", answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    try:
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 8080))
    except KeyboardInterrupt:
        pass
