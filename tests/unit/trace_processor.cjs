// Perfetto's trace processor: RPC requests from stdin, its replies to stdout.
// Usage: node trace_processor.cjs FOLDER, which holds engine_bundle.js and its WebAssembly.
"use strict";
const crypto = require("crypto");
const fs = require("fs");
const path = require("path");
const vm = require("vm");

// Node would show the line of code, too, and the bundle is one line.
process.on("uncaughtException", (error) => {
  console.error(error.stack);
  process.exit(1);
});

const read = (name) => fs.readFileSync(path.join(process.argv[2], path.basename(name)));

class FileRequest {
  open(method, name) {
    this.name = name;
  }
  send() {
    this.response = new Uint8Array(read(this.name)).buffer;
  }
}

// What the bundle, which is a web worker's, takes from its surroundings.
const worker = {
  TextDecoder, TextEncoder, URL, Uint8Array, crypto: crypto.webcrypto, performance, setTimeout, clearTimeout,
  WorkerGlobalScope: class {},
  XMLHttpRequest: FileRequest,
  console: {log: console.error, warn: console.error, error: console.error},
  importScripts: () => {},
  location: {href: "file:///engine_bundle.js"},
};
worker.self = worker;
vm.runInNewContext(read("engine_bundle.js").toString(), worker, {displayErrors: false});

const port = {postMessage: (reply) => fs.writeSync(1, reply)};
worker.onmessage({data: port});
// It accepts requests once the promises are kept that it made while it was loaded.
setImmediate(() => {
  port.onmessage({data: new Uint8Array(fs.readFileSync(0))});
  process.exit(0);
});
