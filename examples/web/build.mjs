// Copies what the page needs of onnxruntime-web into vendor/: the build for WebAssembly alone, and its binary.
import { copyFileSync, mkdirSync } from "node:fs";

const from = new URL("node_modules/onnxruntime-web/dist/", import.meta.url);
const to = new URL("vendor/", import.meta.url);
mkdirSync(to, { recursive: true });
for (const name of ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]) {
  copyFileSync(new URL(name, from), new URL(name, to));
  console.log(`vendor/${name}`);
}
