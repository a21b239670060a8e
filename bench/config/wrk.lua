-- The figures that wrk prints are rounded to units of its choice.
done = function(summary, latency)
  local e = summary.errors
  io.stderr:write(string.format(
    '{"requests": %d, "seconds": %f, "status": %d, "socket": %d, "p50 ms": %f, "p99 ms": %f}',
    summary.requests, summary.duration / 1e6, e.status, e.connect + e.read + e.write + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
