// Drives the Files API of a running server with @google/genai: `node genai_files.mjs SDK_FOLDER BASE_URL TEXT`.
// The client cannot send an empty file.
import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { setTimeout } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { MODEL, report } from "./checks.mjs";

const [sdkFolder, baseUrl, textPath] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${sdkFolder}/package.json`));
const { GoogleGenAI, ApiError } = require("@google/genai");
const version = JSON.parse(readFileSync(`${sdkFolder}/node_modules/@google/genai/package.json`, "utf8")).version;

const client = new GoogleGenAI({ apiKey: "any", httpOptions: { baseUrl } });
const folder = mkdtempSync(`${tmpdir()}/castor-files-`);

// The client's download resolves before its file is written: wait for the bytes, not for the promise.
async function downloaded(file, size) {
  const downloadPath = `${folder}/${file.name.replace("/", "-")}`;
  await client.files.download({ file, downloadPath });
  for (let tries = 0; tries < 100; tries++) {
    try {
      const data = readFileSync(downloadPath);
      if (data.length === size) return data;
    } catch (error) {
      assert.equal(error.code, "ENOENT");
    }
    await setTimeout(100);
  }
  assert.fail("the download never came whole");
}

async function roundTrip(size, asBlob) {
  const data = randomBytes(size);
  const path = `${folder}/${size}.bin`;
  writeFileSync(path, data);
  const config = { mimeType: "application/x-data", displayName: `of ${size}` };
  const file = await client.files.upload({ file: asBlob ? new Blob([data], { type: "application/x-data" }) : path, config });
  assert.equal(Number(file.sizeBytes), size);
  assert.equal(file.displayName, `of ${size}`);
  assert.equal(file.state, "ACTIVE");
  const got = await client.files.get({ name: file.name });
  assert.equal(got.sha256Hash, file.sha256Hash);
  assert.ok((await downloaded(got, size)).equals(data));
  await client.files.delete({ name: file.name });
  await assert.rejects(client.files.get({ name: file.name }), (error) => error instanceof ApiError && error.status === 403);
}

const checks = {
  smallFromPath: () => roundTrip(11, false),
  smallFromBlob: () => roundTrip(11, true),
  largeFromPath: () => roundTrip(17 * 1024 * 1024, false),
  async list() {
    const names = [];
    for (let count = 0; count < 3; count++)
      names.push((await client.files.upload({ file: new Blob(["x"]), config: { mimeType: "text/plain" } })).name);
    const listed = [];
    for await (const file of await client.files.list({ config: { pageSize: 2 } })) listed.push(file.name);
    assert.deepEqual(listed.filter((name) => names.includes(name)), names.reverse());
    for (const name of names) await client.files.delete({ name });
  },
  async document() {
    const file = await client.files.upload({ file: textPath, config: { mimeType: "text/plain" } });
    const parts = [{ fileData: { fileUri: file.uri, mimeType: file.mimeType } }, { text: "What is the name of the dog?" }];
    const config = { temperature: 0, maxOutputTokens: 40 };
    const answer = await client.models.generateContent({ model: MODEL, contents: [{ role: "user", parts }], config });
    assert.match(answer.text, /Rufus/);
    assert.ok(answer.usageMetadata.promptTokensDetails.some((row) => row.modality === "DOCUMENT"));
    await client.files.delete({ name: file.name });
  },
};

await report(version, checks);
