-- Posts one chat request of 2 kB over and over, and prints the outcome as one line of JSON.
-- Arguments after "--": the model's name, the request's size in bytes, then "Name: value" headers.

function init(args)
  local prefix = '{"model":"' .. args[1] .. '","messages":[{"role":"system","content":"Answer briefly."},'
    .. '{"role":"user","content":"'
  local suffix = '"}],"temperature":0.7,"max_tokens":256}'
  local text = "How long does a request take that nobody has to think about? "
  local room = tonumber(args[2]) - #prefix - #suffix
  local content = string.sub(string.rep(text, math.ceil(room / #text)), 1, room)
  local headers = { ["Content-Type"] = "application/json" }
  for i = 3, #args do
    local name, value = string.match(args[i], "^([^:]+): (.*)$")
    headers[name] = value
  end
  prepared = wrk.format("POST", nil, headers, prefix .. content .. suffix)
end

function request()
  return prepared
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests":%d,"duration_us":%d,"p50_us":%d,"p90_us":%d,"p99_us":%d,"max_us":%d,'
      .. '"connect_errors":%d,"read_errors":%d,"write_errors":%d,"status_errors":%d,"timeouts":%d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(90), latency:percentile(99),
    latency.max, errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
