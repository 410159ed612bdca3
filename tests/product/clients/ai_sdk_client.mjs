// Drives a running server with the AI SDK and its Google provider: `node ai_sdk_client.mjs SDK_FOLDER BASE_URL`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { ENDLESS, MODEL, QUESTION, longPrompt, report } from "./checks.mjs";

const [sdkFolder, baseUrl] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${sdkFolder}/package.json`));
// Both are modules without a CommonJS twin: they are imported by the file that their package names.
const load = async (name) => {
  const manifest = JSON.parse(readFileSync(`${sdkFolder}/node_modules/${name}/package.json`, "utf8"));
  const entry = manifest.exports?.["."]?.import ?? manifest.module ?? manifest.main;
  return import(pathToFileURL(`${sdkFolder}/node_modules/${name}/${entry.default ?? entry}`));
};
const { generateObject, generateText, streamText, tool, isStepCount, stepCountIs, APICallError, uploadFile } = await load("ai");
const { createGoogle, createGoogleGenerativeAI } = await load("@ai-sdk/google");
const { z } = require("zod");
const version = JSON.parse(readFileSync(`${sdkFolder}/node_modules/@ai-sdk/google/package.json`, "utf8")).version;

const google = (createGoogle ?? createGoogleGenerativeAI)({ baseURL: `${baseUrl}/v1beta`, apiKey: "any" });
const stepsAre = isStepCount ?? stepCountIs;
const model = google(MODEL);
const exact = { model, temperature: 0, maxRetries: 0 };

const weather = () => {
  const asked = [];
  const definition = tool({
    description: "The weather of a city.",
    inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
    execute: async ({ city }) => {
      asked.push(city);
      return { city, degrees: 21 };
    },
  });
  return { asked, tools: { weather: definition } };
};
// The first step must call, the second must tell: the loop of every agent, also with a model that is no good at it.
// The penalties keep a small model from calling again and again until its tokens are used up.
const loop = {
  presencePenalty: 2,
  frequencyPenalty: 0.5,
  stopWhen: stepsAre(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  maxOutputTokens: 40,
  prompt: "What is the weather in Paris?",
};

async function assertLoop(steps, asked) {
  assert.equal(steps.length, 2);
  assert.equal(steps[0].finishReason, "tool-calls");
  assert.ok(asked.length >= 1 && asked.every((city) => ["Paris", "Rome"].includes(city)));
  assert.equal(steps[0].toolCalls.length, asked.length);
  assert.ok(steps[0].toolCalls.every((call) => call.toolName === "weather" && !call.invalid));
  assert.deepEqual(steps[0].toolResults[0].output, { city: asked[0], degrees: 21 });
  assert.equal(steps[1].toolCalls.length, 0);
  // Mode NONE is as if nothing were declared: what the second prompt has more than the bare question is the result.
  const bare = await generateText({ ...exact, maxOutputTokens: 1, prompt: loop.prompt });
  assert.ok(steps[1].usage.inputTokens > bare.usage.inputTokens, "the result is in the context");
}

const checks = {
  async generateText() {
    const answer = await generateText({ ...exact, maxOutputTokens: 32, prompt: QUESTION });
    assert.match(answer.text, /Paris/);
    assert.equal(answer.finishReason, "stop");
    assert.equal(answer.usage.totalTokens, answer.usage.inputTokens + answer.usage.outputTokens);
  },
  async streamTextEqualsWhole() {
    const whole = await generateText({ ...exact, maxOutputTokens: 32, prompt: QUESTION });
    const stream = streamText({ ...exact, maxOutputTokens: 32, prompt: QUESTION });
    const pieces = [];
    for await (const piece of stream.textStream) pieces.push(piece);
    assert.ok(pieces.length > 1);
    assert.equal(pieces.join(""), whole.text);
    assert.equal(await stream.finishReason, "stop");
    assert.equal((await stream.usage).totalTokens, whole.usage.totalTokens);
  },
  async generateTextWithTools() {
    const { asked, tools } = weather();
    const answer = await generateText({ ...exact, ...loop, tools });
    await assertLoop(answer.steps, asked);
  },
  async streamTextWithTools() {
    const { asked, tools } = weather();
    const stream = streamText({ ...exact, ...loop, tools });
    await stream.consumeStream({ onError: (error) => assert.fail(error) });
    await assertLoop(await stream.steps, asked);
  },
  async generateObject() {
    const schema = z.object({ city: z.enum(["Paris", "Rome"]), ages: z.array(z.number().int().min(0).max(9)).max(2) });
    const { object } = await generateObject({ ...exact, schema, maxOutputTokens: 64, prompt: "Paris, ages 3 and 4." });
    assert.deepEqual(schema.parse(object), object);
  },
  async generateObjectOfEnum() {
    const { object } = await generateObject({ ...exact, output: "enum", enum: ["sunny", "rainy"], maxOutputTokens: 32, prompt: "The sun shines." });
    assert.ok(["sunny", "rainy"].includes(object));
  },
  async uploadedFile() {
    const data = new TextEncoder().encode("The dog of the lighthouse keeper is called Rufus.");
    const options = { google: { displayName: "dog.txt" } };
    const file = await uploadFile({ api: google.files(), data, mediaType: "text/plain", providerOptions: options });
    assert.match(file.providerReference.google, /\/v1beta\/files\/[a-z0-9]+$/);
    assert.equal(file.mediaType, "text/plain");
    const content = [
      { type: "file", data: file.providerReference, mediaType: "text/plain" },
      { type: "text", text: "What is the name of the dog?" },
    ];
    const { text } = await generateText({ ...exact, maxOutputTokens: 40, messages: [{ role: "user", content }] });
    assert.match(text, /Rufus/);
  },
  async silence() {
    const stream = streamText({ model: google(ENDLESS), maxRetries: 0, maxOutputTokens: 8, prompt: longPrompt() });
    assert.equal((await stream.text).length, 8);
  },
  async errorInAStream() {
    const headers = { "X-Server-Timeout": "1" };
    const seen = [];
    const onError = ({ error }) => seen.push(error);
    const stream = streamText({ model: google(ENDLESS), maxRetries: 0, maxOutputTokens: 30_000, prompt: "hi", headers, onError });
    await stream.consumeStream();
    assert.equal(seen.length, 1);
    assert.match(`${seen[0].message}`, /deadline/i);
    assert.equal(await stream.finishReason, "error");
  },
  async refusal() {
    const refused = generateText({ ...exact, temperature: 9, prompt: "hi" });
    await assert.rejects(refused, (error) => APICallError.isInstance(error) && error.statusCode === 400);
  },
  async errors() {
    const nowhere = { ...exact, model: google("no-such-model"), prompt: "hi" };
    await assert.rejects(generateText(nowhere), (error) => {
      assert.ok(APICallError.isInstance(error));
      assert.equal(error.statusCode, 404);
      assert.match(error.message, /no-such-model/);
      return true;
    });
  },
};

await report(version, checks);
