// What test_ollama_clients.py has the npm package ollama do: node ollama.mjs URL KEY; what came of it is JSON.

import { Ollama } from "ollama";

const [url, key] = process.argv.slice(2);
const client = new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } });
const messages = [{ role: "user", content: "Well?" }];
const found = {};

async function failing(what) {
  try {
    await what();
  } catch (error) {
    return [error.name, error.status_code ?? null, (error.error ?? error.message).split(".")[0]];
  }
  throw new Error("it should have failed");
}

found.version = /^\d+\.\d+\.\d+$/.test((await client.version()).version);
found.list = (await client.list()).models.map((model) => model.name);
found.show = (await client.show({ model: "qwen" })).capabilities;
found.ps = (await client.ps()).models.map((model) => model.name);

found.chat = (await client.chat({ model: "qwen:latest", messages })).message.content;

found.stream = [];
for await (const part of await client.chat({ model: "qwen", messages, stream: true, think: true })) {
  found.stream.push(part.message.content);
  if (part.done) found.done = [part.done_reason, part.prompt_eval_count, part.eval_count, part.total_duration > 0];
}

const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ type: "function", function: { name: "weather", description: "It.", parameters } }];
found.tool = (await client.chat({ model: "qwen", messages, tools })).message.tool_calls[0].function;

const image = Uint8Array.from([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
found.image = (await client.generate({ model: "qwen", prompt: "What?", images: [image] })).response;
found.embed = (await client.embed({ model: "qwen", input: ["a", "b"] })).embeddings.length;
found.embeddings = (await client.embeddings({ model: "qwen", prompt: "a" })).embedding;

found.unknown = await failing(() => client.chat({ model: "qwem", messages }));
found.stranger = await failing(() =>
  new Ollama({ host: url, headers: { Authorization: "Bearer no" } }).chat({ model: "qwen", messages }));
found.pull = await failing(() => client.pull({ model: "llama3.2" }));
found.there = (await client.pull({ model: "qwen" })).status;
found.remove = await failing(() => client.delete({ model: "qwen" }));
found.broken = await failing(async () => {
  for await (const _ of await client.chat({ model: "broken", messages, stream: true }));
});

const long = await client.chat({ model: "endless", messages, stream: true });
setTimeout(() => long.abort(), 0);
found.aborted = await failing(async () => {
  for await (const _ of long);
});

console.log(JSON.stringify(found));
