#!/bin/sh
# The routes of `jaxserve serve` by hand: sh examples/curl.sh [URL] [KEY]
set -eu
URL=${1:-http://127.0.0.1:8000}
KEY=${2:-none}
ask() { curl --silent --show-error --fail-with-body -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" "$@"; echo; }

ask "$URL/health"
ask "$URL/v1/models"
ask "$URL/v1/completions" -d '{"prompt": "The sky is", "max_tokens": 8, "temperature": 0}'
ask "$URL/v1/chat/completions" \
    -d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 20, "temperature": 0}'
ask --no-buffer "$URL/v1/chat/completions" \
    -d '{"messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 20, "stream": true}'
ask "$URL/tokenize" -d '{"prompt": "Hello world", "return_token_strs": true}'
ask "$URL/detokenize" -d '{"tokens": [19556, 905]}'
ask "$URL/metrics" | grep generation_tokens
