// What test_gateway_clients.py has the npm package openai do: node client.mjs URL KEY; what came of it is JSON.

import { createHash } from "node:crypto";
import OpenAI, { toFile } from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: "Well?" }];
const found = {};

async function failing(what) {
  try {
    await what();
  } catch (error) {
    return [error.constructor.name, error.status, error.code, error.headers?.get("retry-after")];
  }
  throw new Error("it should have failed");
}

found.chat = (await client.chat.completions.create({ model: "qwen", messages })).choices[0].message.content;

found.stream = [];
for await (const part of await client.chat.completions.create({ model: "qwen", messages, stream: true })) {
  found.stream.push(part.choices[0]?.delta?.content ?? null);
}

const parameters = { type: "object", properties: { city: { type: "string" } } };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const called = await client.chat.completions.create({ model: "qwen", messages, tools });
found.tool = called.choices[0].message.tool_calls[0].function;

found.embedding = (await client.embeddings.create({ model: "qwen", input: "Well?" })).data[0].embedding;

const audio = Buffer.alloc(300_000, "sound");
const transcribed = await client.audio.transcriptions.create({ file: await toFile(audio, "a.wav"), model: "qwen" });
found.audio = transcribed.text === createHash("sha256").update(audio).digest("hex");

found.models = [];
for await (const model of client.models.list()) found.models.push(model.id);

const long = "x".repeat(50_000_000);
const lengthy = await client.chat.completions.create({ messages: [{ role: "user", content: long }], model: "qwen" });
found.long = lengthy.choices[0].message.content;

found.unknown = await failing(() => client.chat.completions.create({ model: "qwem", messages }));
found.stranger = await failing(() =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: "no", maxRetries: 0 }).chat.completions.create({ model: "qwen", messages }));
found.away = await failing(() => client.chat.completions.create({ model: "away", messages }));
found.full = await failing(() => client.chat.completions.create({ model: "full", messages }));
found.broken = await failing(async () => {
  for await (const _ of await client.chat.completions.create({ model: "broken", messages, stream: true }));
});

console.log(JSON.stringify(found));
