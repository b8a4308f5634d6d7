// Keeps the files of the page in the browser, so that it works without a network. The line above, which the export has
// written, has their checksums: another export makes another worker, which takes its own files and drops these.

const KEPT = `${registration.scope}#`, OWN = KEPT + VERSION;  // several pages may be on one host

async function keep() {
  const cache = await caches.open(OWN);
  await Promise.all(Object.entries(FILES).map(async ([name, integrity]) => {
    const response = await fetch(encodeURIComponent(name), {cache: "no-cache", integrity});
    if (!response.ok) throw new Error(name);
    // a copy, because browsers refuse to open a page by an answer that was redirected
    const headers = {"Content-Type": response.headers.get("Content-Type") ?? ""};
    await cache.put(new URL(encodeURIComponent(name), registration.scope), new Response(await response.blob(), {headers}));
  }));
}

async function drop() {
  const others = (await caches.keys()).filter(name => name.startsWith(KEPT) && name !== OWN);
  await Promise.all(others.map(name => caches.delete(name)));
}

async function answer(request) {
  const cache = await caches.open(OWN);
  const asked = request.url.split(/[?#]/)[0] === registration.scope ? new URL("index.html", registration.scope) : request;
  return await cache.match(asked, {ignoreSearch: true}) ?? fetch(request);
}

addEventListener("install", event => event.waitUntil(keep()));
addEventListener("activate", event => event.waitUntil(drop()));
addEventListener("message", () => skipWaiting());  // from a page that has loaded all its files
addEventListener("fetch", event => event.respondWith(answer(event.request)));
