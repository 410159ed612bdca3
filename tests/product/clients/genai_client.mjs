// Drives a running server with the @google/genai SDK: `node genai_client.mjs SDK_FOLDER BASE_URL`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { ENDLESS, MODEL, QUESTION, longPrompt, report } from "./checks.mjs";

const [sdkFolder, baseUrl] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${sdkFolder}/package.json`));
const { GoogleGenAI, ApiError } = require("@google/genai");
const version = JSON.parse(readFileSync(`${sdkFolder}/node_modules/@google/genai/package.json`, "utf8")).version;

const exact = { temperature: 0, maxOutputTokens: 32 };
const client = new GoogleGenAI({ apiKey: "any", httpOptions: { baseUrl } });

const checks = {
  async generate() {
    const answer = await client.models.generateContent({ model: MODEL, contents: QUESTION, config: exact });
    assert.match(answer.text, /Paris/);
    assert.equal(answer.candidates[0].finishReason, "STOP");
    assert.equal(answer.usageMetadata.candidatesTokenCount, answer.candidates[0].tokenCount);
    assert.equal(answer.modelVersion, MODEL);
  },
  async cloudModelName() {
    const answer = await client.models.generateContent({ model: "gemini-2.5-flash", contents: QUESTION, config: exact });
    assert.match(answer.text, /Paris/);
  },
  async streamEqualsWhole() {
    const whole = await client.models.generateContent({ model: MODEL, contents: QUESTION, config: exact });
    const chunks = [];
    for await (const chunk of await client.models.generateContentStream({ model: MODEL, contents: QUESTION, config: exact })) chunks.push(chunk);
    assert.equal(chunks.map((chunk) => chunk.text ?? "").join(""), whole.text);
    assert.equal(chunks.at(-1).candidates[0].finishReason, "STOP");
    assert.equal(chunks.at(-1).usageMetadata.totalTokenCount, whole.usageMetadata.totalTokenCount);
  },
  async logprobs() {
    const config = { ...exact, responseLogprobs: true, logprobs: 3 };
    const [candidate] = (await client.models.generateContent({ model: MODEL, contents: QUESTION, config })).candidates;
    assert.equal(candidate.logprobsResult.chosenCandidates.length, candidate.tokenCount);
    assert.equal(candidate.logprobsResult.topCandidates[0].candidates.length, 3);
    assert.ok(candidate.avgLogprobs <= 0);
  },
  async stopSequences() {
    const config = { ...exact, stopSequences: ["Paris"] };
    const answer = await client.models.generateContent({ model: MODEL, contents: QUESTION, config });
    assert.doesNotMatch(answer.text ?? "", /Paris/);
    assert.equal(answer.candidates[0].finishReason, "STOP");
  },
  async chatKeepsHistory() {
    const chat = client.chats.create({ model: MODEL, config: exact });
    for (const message of ["My name is Ada.", "What is my name?"])
      for await (const _ of await chat.sendMessageStream({ message }));
    assert.equal(chat.getHistory(true).filter((turn) => turn.role === "user").length, 2);
    await chat.sendMessage({ message: "Thanks." });
    assert.equal(chat.getHistory(true).filter((turn) => turn.role === "user").length, 3);
  },
  async countTokens() {
    const counted = await client.models.countTokens({ model: MODEL, contents: QUESTION });
    const answer = await client.models.generateContent({ model: MODEL, contents: QUESTION, config: exact });
    assert.equal(counted.totalTokens, answer.usageMetadata.promptTokenCount);
  },
  async models() {
    const names = [];
    for await (const model of await client.models.list({ config: { pageSize: 1 } })) names.push(model.name);
    assert.ok(names.includes(`models/${MODEL}`));
    assert.equal((await client.models.get({ model: "gemini-2.5-pro" })).name, `models/${MODEL}`);
  },
  async errors() {
    await assert.rejects(client.models.generateContent({ model: "no-such-model", contents: "hi" }), (error) => {
      assert.ok(error instanceof ApiError);
      assert.equal(error.status, 404);
      return true;
    });
  },
  async silence() {
    let text = "";
    const request = { model: ENDLESS, contents: longPrompt(), config: { maxOutputTokens: 8 } };
    for await (const chunk of await client.models.generateContentStream(request)) text += chunk.text ?? "";
    assert.equal(text.length, 8);
  },
  async errorInAStream() {
    const config = { maxOutputTokens: 30_000, httpOptions: { headers: { "X-Server-Timeout": "1" } } };
    const stream = await client.models.generateContentStream({ model: ENDLESS, contents: "hi", config });
    await assert.rejects(async () => {
      for await (const _ of stream);
    }, (error) => error instanceof ApiError && error.status === 504);
  },
  async abort() {
    const controller = new AbortController();
    const config = { temperature: 1, maxOutputTokens: 2000, abortSignal: controller.signal };
    const stream = await client.models.generateContentStream({ model: MODEL, contents: "Tell me a very long story.", config });
    await assert.rejects(async () => {
      for await (const _ of stream) controller.abort();
    });
  },
};

await report(version, checks);
