// Keeps the status page up to date: the server renders it, and this asks again when something happened.
"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const LOG_LINES = 1000;
  const MOVING_MS = 1000; // while a model starts or stops
  const RESTING_MS = 10000; // what is no event shows then, too
  const DOUBLE_CLICK_MS = 500;

  // -- Clocks ---------------------------------------------------------------------------------------------------------

  let ahead = 0; // seconds of the server's clock before ours

  // As duration() of clock.py has it.
  function duration(seconds) {
    const whole = Math.trunc(seconds);
    if (whole <= 0) return "a moment";
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min`;
    if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
    return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
  }

  function tick() {
    const now = Date.now() / 1000 + ahead;
    for (const clock of document.querySelectorAll("[data-since], [data-until]")) {
      const { since, until } = clock.dataset;
      const text = duration(since === undefined ? until - now : now - since);
      if (clock.textContent !== text) clock.textContent = text;
    }
  }

  // -- Refreshes ------------------------------------------------------------------------------------------------------

  // Make `old` what `fresh` is, and keep every element that both have: with it the focus, and what a finger is on.
  function mend(old, fresh) {
    if (old.isEqualNode(fresh)) return;
    if (old.nodeType !== Node.ELEMENT_NODE || old.nodeName !== fresh.nodeName) {
      old.replaceWith(fresh);
      return;
    }
    for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of [...fresh.attributes]) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
    const wanted = new Set([...fresh.children].map((child) => child.id));
    let next = old.firstChild;
    for (const child of [...fresh.childNodes]) {
      while (next && next.id && !wanted.has(next.id)) {
        const gone = next;
        next = next.nextSibling;
        gone.remove();
      }
      const same = child.id ? named.get(child.id) : next && !next.id ? next : null;
      if (!same) {
        old.insertBefore(child, next);
        continue;
      }
      if (same === next) next = next.nextSibling;
      else old.insertBefore(same, next);
      mend(same, child);
    }
    while (next) {
      const gone = next;
      next = next.nextSibling;
      gone.remove();
    }
  }

  function states() {
    return new Map([...document.querySelectorAll("[data-state]")].map((row) => [row.dataset.name, row.dataset.state]));
  }

  function announce(before, after) {
    const news = [...after].filter(([name, state]) => before.has(name) && before.get(name) !== state);
    if (news.length) byId("announcement").textContent = news.map(([name, state]) => `${name} is ${state}.`).join(" ");
  }

  let timer = 0;
  let isAsking = false;
  let isAskedAgain = false;

  async function refresh() {
    clearTimeout(timer);
    if (isAsking) {
      isAskedAgain = true;
      return;
    }
    isAsking = true;
    try {
      const response = await fetch("gpusvc/page", { headers: { Accept: "text/html" } });
      if (!response.ok) throw new Error(response.status);
      const fresh = new DOMParser().parseFromString(await response.text(), "text/html").body.firstElementChild;
      const before = states();
      mend(byId("moment"), document.adoptNode(fresh));
      announce(before, states());
      ahead = Number(byId("moment").dataset.now) - Date.now() / 1000;
      tick();
      showLink(true);
    } catch {
      showLink(false);
    } finally {
      isAsking = false;
    }
    if (isAskedAgain) {
      isAskedAgain = false;
      refresh();
      return;
    }
    const isMoving = document.querySelector('[data-state="starting"], [data-state="stopping"]');
    if (!document.hidden) timer = setTimeout(refresh, isMoving ? MOVING_MS : RESTING_MS);
  }

  // What is read is shared for a second: what an event tells of may not be in it yet.
  function refreshSoon() {
    refresh();
    setTimeout(refresh, MOVING_MS + 200);
  }

  function showLink(isUp) {
    const link = byId("link");
    const text = isUp ? "Live" : "The connection is lost. Trying again…";
    link.classList.toggle("lost", !isUp);
    if (link.textContent !== text) link.textContent = text;
  }

  document.addEventListener("visibilitychange", () => document.hidden || refresh());

  // -- Events ---------------------------------------------------------------------------------------------------------

  const KINDS = [
    "start", "ready", "fail", "refusal", "idle", "stuck", "failing", "pressure", "evict", "release", "unreleased",
    "abandon", "leak",
  ];

  function follow(url, { kinds, onNews, onOpen, onError }) {
    const stream = new EventSource(url);
    stream.addEventListener("open", () => onOpen?.());
    stream.addEventListener("message", onNews);
    for (const kind of kinds) stream.addEventListener(kind, onNews);
    stream.addEventListener("error", (event) => onError?.(event, stream));
    return stream;
  }

  function followEvents() {
    follow("gpusvc/events?lines=0", {
      kinds: KINDS,
      onNews: refreshSoon,
      onOpen: refresh,
      onError: (_, stream) => {
        // A browser tries again by itself, unless it was told something else than a stream.
        if (stream.readyState === EventSource.CLOSED) setTimeout(followEvents, RESTING_MS);
      },
    });
  }

  // -- Buttons --------------------------------------------------------------------------------------------------------

  const pressedAt = new WeakMap();

  function complain(message, hint) {
    const alert = byId("alert");
    const close = Object.assign(document.createElement("button"), { type: "button", textContent: "Dismiss" });
    close.addEventListener("click", () => alert.replaceChildren());
    const text = Object.assign(document.createElement("p"), { textContent: [message, hint].filter(Boolean).join(" ") });
    alert.replaceChildren(text, close);
  }

  async function send(form) {
    const row = form.closest("[data-name]");
    row.setAttribute("aria-busy", "true");
    byId("alert").replaceChildren();
    try {
      const sent = fetch(`${form.getAttribute("action")}?wait=no`, {
        method: "POST",
        headers: { Accept: "application/json" },
      });
      setTimeout(refresh, 100); // it may take as long as a model takes to go
      const response = await sent;
      if (!response.ok) {
        const { error } = await response.json().catch(() => ({ error: { message: `It said ${response.status}.` } }));
        complain(error.message, error.hint);
      }
    } catch {
      complain("gpusvc does not answer.");
    }
    refreshSoon();
  }

  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (!form.closest(".actions")) return;
    event.preventDefault();
    if (form.querySelector('[aria-disabled="true"]')) return;
    // The second half of a double click would hit what the button has become.
    const row = form.closest("[data-name]");
    const now = performance.now();
    if (now - (pressedAt.get(row) ?? -Infinity) < DOUBLE_CLICK_MS) return;
    if (form.dataset.question && !confirm(form.dataset.question)) return;
    pressedAt.set(row, now);
    send(form);
  });

  // -- Logs -----------------------------------------------------------------------------------------------------------

  let log = null;

  const TIME = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  const DAY = new Intl.DateTimeFormat("en-GB", { day: "2-digit", month: "short", hour: "2-digit", minute: "2-digit" });

  // The time of day, and of another day the day.
  function clockOf(seconds) {
    const date = new Date(seconds * 1000);
    const isToday = date.toDateString() === new Date().toDateString();
    const time = document.createElement("time");
    time.dateTime = date.toISOString();
    time.title = date.toLocaleString("en-GB");
    time.textContent = (isToday ? TIME : DAY).format(date).replace(",", "");
    return time;
  }

  function addLine(entry) {
    const lines = byId("log-lines");
    const isAtEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
    const line = document.createElement("p");
    line.className = `level${Number(entry.level)}`;
    const text = document.createElement("span");
    text.textContent = entry.message;
    line.append(clockOf(entry.time), " ", text);
    lines.append(line);
    while (lines.childElementCount > LOG_LINES) lines.firstElementChild.remove();
    if (isAtEnd) lines.scrollTop = lines.scrollHeight;
    byId("log-note").textContent = "";
  }

  function openLog(name) {
    log?.close();
    const lines = byId("log-lines");
    lines.replaceChildren();
    lines.hidden = false;
    byId("log-name").textContent = ` of ${name}`;
    byId("log-note").textContent = "Nothing yet.";
    let isFirst = true;
    log = follow(`gpusvc/models/${encodeURIComponent(name)}/log?lines=200`, {
      kinds: ["line"],
      onNews: (event) => addLine(JSON.parse(event.data)),
      onOpen: () => {
        // It begins anew each time, with the last lines that there are.
        if (!isFirst) lines.replaceChildren();
        isFirst = false;
      },
      onError: (event, stream) => {
        const told = event.data ? JSON.parse(event.data) : null;
        if (told) stream.close();
        if (told) byId("log-note").textContent = [told.message, told.hint].filter(Boolean).join(" ");
        else if (stream.readyState === EventSource.CLOSED) byId("log-note").textContent = "The log cannot be read.";
      },
    });
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-log]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    openLog(link.dataset.log);
    history.replaceState(null, "", link.getAttribute("href"));
    byId("log-lines").focus({ preventScroll: true });
    byId("log").scrollIntoView({ block: "nearest" });
  });

  ahead = Number(byId("moment").dataset.now) - Date.now() / 1000;
  tick();
  setInterval(tick, 1000);
  followEvents();
  if (byId("log").dataset.log) openLog(byId("log").dataset.log);
})();
