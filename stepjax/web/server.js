// Requests to the server, and its event streams.

export async function call(path, body, { key, signal } = {}) {
  const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
  const method = body === undefined ? "GET" : "POST";
  const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("Cannot reach the server.");
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const said = answer?.error?.message ?? `The server answered with status ${response.status}.`;
  const message = response.status === 401 ? "This server needs an API key: enter it above." : said;
  throw Object.assign(new Error(message), { status: response.status });
}

export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = new Error("The connection was lost before the answer was complete.");
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : broken;
    });
    if (done) throw broken;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
