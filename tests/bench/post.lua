-- What wrk sends: a chat of so many bytes. Its last line of output is what came of it, as JSON.
-- wrk -s post.lua URL -- MODEL BYTES KEY

function init(args)
    local chat = '{"model": "%s", "messages": [{"role": "user", "content": "%s"}]}'
    wrk.method = "POST"
    wrk.body = chat:format(args[1], ("x"):rep(tonumber(args[2])))
    wrk.headers["Content-Type"] = "application/json"
    wrk.headers["Authorization"] = "Bearer " .. args[3]
end

function done(summary, latency, requests)
    local errors = 0
    for _, count in pairs(summary.errors) do
        errors = errors + count
    end
    local result = '{"requests": %d, "seconds": %.6f, "p50": %.6f, "p99": %.6f, "errors": %d}\n'
    local second = 1e6
    io.write(result:format(summary.requests, summary.duration / second,
        latency:percentile(50) / second, latency:percentile(99) / second, errors))
end
