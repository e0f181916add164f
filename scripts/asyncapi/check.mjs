// Reads an AsyncAPI document with AsyncAPI's own parser, and says what is wrong with it.

import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";

const path = process.argv[2];
const { document, diagnostics } = await new Parser().parse(readFileSync(path, "utf8"));
const faults = diagnostics.filter(({ severity }) => severity <= 1);
for (const { message, path: where, severity } of faults) {
    console.error(`${path}: ${severity === 0 ? "error" : "warning"}: ${where.join(".")}: ${message}`);
}
if (document === undefined || faults.length > 0) process.exit(1);
const operations = document.operations().all().length;
console.log(`${path}: ${operations} operations on ${document.channels().all().length} channels, nothing amiss`);
